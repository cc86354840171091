"""`tandem doctor`: what on this machine would keep Tandem from running, and what to do about it."""

from services.cli.doctor.machine import available_memory_bytes
from services.cli.doctor.registry import RedisUnusable, redis_version

__all__ = ["RedisUnusable", "available_memory_bytes", "redis_version"]
