"""`tandem doctor`: what on this machine would keep Tandem from running, and what to do about it."""
