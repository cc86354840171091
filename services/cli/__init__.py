"""The `tandem` command: up, doctor, size and version, and the services by name."""
