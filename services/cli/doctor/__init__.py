"""`tandem doctor`: what on this machine would keep Tandem from running, and what to do about it."""

from services.cli.doctor.machine import available_memory_bytes

__all__ = ["available_memory_bytes"]
