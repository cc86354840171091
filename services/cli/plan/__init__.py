"""`tandem plan`: says how many workers a trace takes, by simulation."""
