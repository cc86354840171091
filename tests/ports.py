"""Ports for processes that must be told theirs, and take a while until they listen."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket

# Below those that the kernel gives to whoever asks for any port (from 32768 on): nobody gets one by chance meanwhile.
_FIRST, _LAST = 10_000, 19_999
_NUM_SHARES = 16
_SHARE = (_LAST + 1 - _FIRST) // _NUM_SHARES
# Processes of one run, `gw0`, `gw1` .., each have a share: what one has chosen and not opened yet, no other chooses.
_number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_first = _FIRST + _number % _NUM_SHARES * _SHARE
_next = itertools.count(random.randrange(_SHARE))  # each comes again only when all others have


def free_port(also_above: int = 0) -> int:
    """A port of 127.0.0.1 that is free, and stays so; and the one that is `also_above` higher is free, too."""
    for _ in range(100):
        port = _first + next(_next) % _SHARE
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", port))
            if also_above:
                second.bind(("127.0.0.1", port + also_above))
            return port
    raise AssertionError("no free port")
