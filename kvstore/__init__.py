"""The block store: keeps, finds, lends and moves blocks of keys and values between processes."""
