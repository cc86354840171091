"""Two processes between which some connections bring nothing any more, while others go on: nobody is told.

A filter on the sockets themselves drops what comes, before it is acknowledged; it needs the right to look into both
processes (root, or `ptrace`).
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress

_ATTACH_FILTER, _DETACH_FILTER = 26, 27
_PIDFD_GETFD = 438
_Ends = tuple[tuple[str, int], tuple[str, int]]


@contextmanager
def black_hole(pid: int, other_pid: int, spared_ports: Collection[int]) -> Iterator[int]:
    """Between these processes nothing comes through, but over the spared ports; yields over how many connections."""
    one, other = _sockets(pid), _sockets(other_pid)
    held = [
        each
        for ends in one
        if (ends[1], ends[0]) in other and not {ends[0][1], ends[1][1]} & set(spared_ports)
        for each in (one[ends], other[ends[1], ends[0]])
    ]
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # return 0: of the packet nothing is kept
    for each in held:
        each.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HxxxxxxQ", 1, ctypes.addressof(code)))
    try:
        yield len(held) // 2
    finally:
        for each in held:
            each.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)
        for each in (*one.values(), *other.values()):
            each.close()


def _sockets(pid: int) -> dict[_Ends, socket.socket]:
    """The process's own connected sockets, by (its end, the other end)."""
    process, found = os.pidfd_open(pid), dict[_Ends, socket.socket]()
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):  # closed meanwhile, no socket, not connected
                if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    continue
                copy = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, int(name), 0)
                if copy < 0:
                    raise OSError(ctypes.get_errno(), f"no copy of file {name} of process {pid}")
                each = socket.socket(fileno=copy)
                with ExitStack() as unless_kept:
                    unless_kept.callback(each.close)
                    if each.family in (socket.AF_INET, socket.AF_INET6) and each.type == socket.SOCK_STREAM:
                        found[each.getsockname()[:2], each.getpeername()[:2]] = each
                        unless_kept.pop_all()
    finally:
        os.close(process)
    return found
