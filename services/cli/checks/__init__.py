"""The examinations of `tandem doctor`; each is a function that returns findings."""
