"""What the starts and ends of all processes have in common: exit statuses, ports, Redis."""

from __future__ import annotations

import logging
import socket
from contextlib import closing
from typing import Final

log = logging.getLogger(__name__)

CANNOT_START: Final = 2
"""The exit status of a process that has said, in one line, what is wrong, where, and what to do about it."""

STUCK: Final = 3
"""The exit status of a process a part of which had work and did not get on; its log says which, and where."""


def address_of(host: str, port: int | str) -> str:
    """Return "host:port", as one dials it: an IPv6 address has brackets there."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class CannotListen(Exception):
    """A port is taken, or the address is not ours. `flag` is the setting that gives the port."""

    def __init__(self, host: str, port: int, flag: str, why: object) -> None:
        super().__init__(f"cannot listen on {address_of(host, port)}: {why}; give another --host or {flag}")


def claim_port(host: str, port: int, flag: str = "--port") -> int:
    """`port` if it is free, or a free one if it is 0. Raises CannotListen: better now than after loading the model."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            claimed: int = probe.getsockname()[1]
            return claimed
    except OSError as error:
        raise CannotListen(host, port, flag, error.strerror) from error


def check_registry(url: str) -> None:
    """Ask Redis once. One that is away is not waited for: sessions with it try until it is there. Blocks.

    Raises `RegistryError` where the URL is malformed or Redis refuses us.
    """
    from kvstore.registry import RegistryAway, redis_version

    try:
        redis_version(url)
    except RegistryAway as error:
        log.warning("%s; going on without it, and trying again", error)
