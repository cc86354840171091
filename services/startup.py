"""Says what the starts of all processes have in common: the status of one that its operator must help, and Redis."""

from __future__ import annotations

import logging
from typing import Final

log = logging.getLogger(__name__)

CANNOT_START: Final = 2
"""The exit status of a process that has said, in one line, what is wrong, where, and what to do about it."""


def cannot_listen(host: str, port: int, flag: str, why: object) -> str:
    """The message where an address cannot be listened on: `flag` is what gives the port."""
    return f"cannot listen on {host}:{port}: {why}; give another --host or {flag}"


def check_registry(url: str) -> None:
    """Ask Redis once. One that is away is not waited for: sessions with it try until it is there. Blocks.

    Raises `RegistryError` where the URL is malformed or Redis refuses us.
    """
    from kvstore.registry import RegistryAway, redis_version

    try:
        redis_version(url)
    except RegistryAway as error:
        log.warning("%s; going on without it, and trying again", error)
