"""Who reaches the ports of a process: tried, since a port may be closed in other ways than by its address."""

from __future__ import annotations

import contextlib
import socket

import psutil

ELSEWHERE = "127.0.0.2"
"""An address that every machine takes for its own, and that nothing listens on: it stands for those of its networks."""


def listening(pid: int | None = None) -> list[tuple[str, int]]:
    """Where a process listens for TCP connections: this one, if none is named."""
    sockets = psutil.Process(pid).net_connections("tcp")
    return [(each.laddr.ip, each.laddr.port) for each in sockets if each.status == psutil.CONN_LISTEN]


def reached_from_elsewhere(pid: int) -> list[tuple[str, int]]:
    """The addresses, other than 127.0.0.1, under which something of a process is reached, with the ports."""
    found = {one.address for theirs in psutil.net_if_addrs().values() for one in theirs if one.family == socket.AF_INET}
    addresses = sorted({ELSEWHERE, *found} - {"127.0.0.1"})
    with contextlib.ExitStack() as cleanup:
        tries = []
        for _, port in listening(pid):
            for address in addresses:
                connecting = cleanup.enter_context(socket.socket())
                connecting.setblocking(False)
                connecting.connect_ex((address, port))
                tries.append((connecting, address, port))
            # What comes over loopback has come when the call returns. Once this is through, they are, or never will be.
            if (here := ("127.0.0.1", port)) in listening(pid) or ("0.0.0.0", port) in listening(pid):
                socket.create_connection(here).close()
        return [(address, port) for each, address, port in tries if _is_connected(each)]


def _is_connected(connecting: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        connecting.getpeername()
        return True
    return False
