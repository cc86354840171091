"""Ports for processes that must be told theirs, and take a while until they listen."""

from __future__ import annotations

import contextlib
import random
import socket

# Below those that the kernel gives to whoever asks for any port (from 32768 on): nobody gets one by chance meanwhile.
_FIRST, _LAST = 10_000, 19_999


def free_port(also_above: int = 0) -> int:
    """A port of 127.0.0.1 that is free, and stays so; and the one that is `also_above` higher is free, too."""
    for _ in range(100):
        port = random.randint(_FIRST, _LAST)
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", port))
            if also_above:
                second.bind(("127.0.0.1", port + also_above))
            return port
    raise AssertionError("no free port")
