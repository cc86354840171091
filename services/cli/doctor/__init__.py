"""`tandem doctor`: finds what keeps Tandem from running on this machine, and says what to do about it."""
