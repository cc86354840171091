"""Starts programs by forking itself, with their packages loaded: `python -m services.cli.up.forks FD MODULE …`.

Importing torch takes longer than anything else that a worker does before it serves. So one process imports what workers
need, starts no thread and opens nothing, and then forks for each order that comes over the socket FD. What a child runs
is `python -m` of a module, to the end of the interpreter, with its own environment, output and session. The launcher's
end is forks.py; if the launcher dies, the kernel kills this process, and with it the children.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
from dataclasses import dataclass

from services.cli.up.forks.child import bind

LENGTH = struct.Struct("!I")
"""Stands before an order, which is JSON; the child's output goes along with it."""
FILLER = " " * 4096
"""The server's last argument: room for the command lines of its children, which `ps` reads from where it stood."""

_PR_SET_NAME = 15  # <linux/prctl.h>


@dataclass(frozen=True)
class Order:
    """A child to be: the flags of `python -m MODULE`, its environment, cores, and the descriptor that it writes to."""

    name: str
    module: str
    flags: list[str]
    environ: dict[str, str]
    cores: list[int]
    output: int


def main(arguments: list[str]) -> None:
    control, modules = socket.socket(fileno=int(arguments[0])), arguments[1:-1]
    show_command("tandem forks", [sys.executable, "-m", "services.cli.up.forks", *modules])
    for module in modules:
        with contextlib.suppress(ImportError):  # a child meets it, too, and says so in its own output
            importlib.import_module(module)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"importing {modules} has started {len(threads) - 1} threads, which no child would have"
    gc.collect()
    gc.freeze()  # else each child's first collection would copy all pages
    server, order = os.getpid(), serve(control)
    if order is not None:
        become(order, server)


def serve(control: socket.socket) -> Order | None:
    """Fork a child for each order and report each one's end, until the launcher hangs up: None.

    Returns in each child, too, which then leads a session of its own: its order.
    """
    ended, woken = socket.socketpair()
    ended.setblocking(False)
    woken.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken.fileno())
    while True:
        readable, _, _ = select.select([control, ended], [], [])
        if ended in readable:
            ended.recv(4096)
            _report_ends(control)
        if control in readable:
            order = _receive(control)
            if order is None:
                return None
            is_apart, apart = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.setsid()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for ours in (control, ended, woken):
                    ours.close()
                os.close(is_apart)
                os.close(apart)
                return order
            os.close(order.output)
            os.close(apart)
            os.read(is_apart, 1)  # until it has closed its end: from here on its group can be killed
            os.close(is_apart)
            _say(control, started=pid)


def become(order: Order, server: int) -> None:
    """Run the order's module as a program, in the child that was forked for it by `server`; to be called last."""
    os.dup2(order.output, 1)
    os.dup2(order.output, 2)
    os.close(order.output)
    bind(server, order.cores)
    os.environ.clear()
    os.environ.update(order.environ)
    show_command(order.name, [sys.executable, "-m", order.module, *order.flags])
    sys.argv = [order.module, *order.flags]
    runpy.run_module(order.module, run_name="__main__", alter_sys=True)


def show_command(name: str, argv: list[str]) -> None:
    """Show this command line and this name, of which 15 bytes count, in `ps`."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
    with open("/proc/self/stat", encoding="utf-8") as file:
        fields = file.read().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5), counted from the state
    text = b"\0".join(os.fsencode(argument) for argument in argv)[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def _receive(control: socket.socket) -> Order | None:
    header, descriptors, _, _ = socket.recv_fds(control, LENGTH.size, 1)
    if not header:
        return None
    (length,) = LENGTH.unpack(header)
    data = b""
    while len(data) < length:
        piece = control.recv(length - len(data))
        if not piece:
            return None
        data += piece
    return Order(**json.loads(data), output=descriptors[0])


def _report_ends(control: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):  # there is no child left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _say(control, ended=ended[0], status=os.waitstatus_to_exitcode(ended[1]))


def _say(control: socket.socket, **message: int) -> None:
    control.sendall(json.dumps(message).encode() + b"\n")
