"""The launcher's end of the fork server: orders children from it, and knows when they end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.cli.up.forks.fork_server import FILLER, LENGTH
from services.cli.up.spec import ChildSpec

SHIM = str(Path(__file__).with_name("child.py"))
"""A program that becomes another one, which dies with whoever started it."""
WORKER_MODULES = (
    "services.worker.start",
    "services.worker.process",
    "services.elastic.service",  # prefill and decode, too
    "grpc_health.v1.health",
    "uvicorn.protocols.http.auto",
)
"""What workers import before they serve, beside their engine. None starts a thread, or opens UCX, CUDA or gRPC."""


log = logging.getLogger(__name__)


class ForksLost(Exception):
    """The fork server has ended, and its children with it."""


@dataclass
class Forked:
    """A process that the server forked, as `asyncio.subprocess.Process` shows its own."""

    pid: int
    ended: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def wait(self) -> int:
        """Return the exit status, negative for a signal."""
        return await asyncio.shield(self.ended)

    def terminate(self) -> None:
        """Send SIGTERM. Raises ProcessLookupError."""
        if self.ended.done():
            raise ProcessLookupError
        os.kill(self.pid, signal.SIGTERM)


class Forks:
    """The fork server's process, and its children. Start it early, on the main thread; then use it from one loop.

    the server          an order                        its children                    then
    loads, forks        waits until it has loaded       live with it                    -
    ends, has forked    fails (ForksLost)               end with it                     another one is started
    ends before that    fails, as do all after it       -                               nothing: it would end again
    cannot be started   fails, as do all after it       end with the one before         nothing
    is closed, killed   fails                           end with it                     nothing
    """

    def __init__(self, modules: Sequence[str], environ: Mapping[str, str]) -> None:
        """Start the server, which imports the modules at once. Libraries read `environ` as they load."""
        self._modules = modules
        self._environ = environ
        self._server, self._control = self._start()
        self._reading: asyncio.Task[None] | None = None
        self._ordering: asyncio.Lock = asyncio.Lock()
        self._starting: deque[asyncio.Future[Forked]] = deque()
        self._running: dict[int, Forked] = {}
        self._old_controls: list[socket.socket] = []
        self._has_forked = False
        self._is_ending = False

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start a server; returns it, and our end of what orders go over."""
        control, theirs = socket.socketpair()
        control.setblocking(False)
        with theirs:
            server = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", SHIM, str(os.getpid()), ""),
                    *(sys.executable, "-m", "services.cli.up.forks", str(theirs.fileno())),
                    *(*self._modules, FILLER),
                ],
                # OpenBLAS would start threads as it loads. Workers use it for next to nothing.
                env={"OPENBLAS_NUM_THREADS": "1", **self._environ, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=2,  # it says nothing, unless it fails
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        return server, control

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._server.pid

    async def fork(self, spec: ChildSpec, output: int) -> Forked:
        """Start `python -m MODULE …`, what `spec.argv` is, writing to `output`, which stays the caller's.

        Waits for the server to have loaded its modules. Raises ForksLost.
        """
        python, dash_m, module, *flags = spec.argv
        assert (python, dash_m) == (sys.executable, "-m"), spec.argv
        order = {"name": spec.name, "module": module, "flags": flags}
        data = json.dumps(order | {"environ": dict(spec.environ), "cores": spec.cores}).encode()
        loop = asyncio.get_running_loop()
        started: asyncio.Future[Forked] = loop.create_future()
        async with self._ordering:
            if self._reading is None:
                self._reading = asyncio.create_task(self._read(), name="fork server")
            if self._reading.done():
                raise ForksLost
            while self._old_controls:  # no order is on its way into one of these any more
                self._old_controls.pop().close()
            control = self._control
            self._starting.append(started)
            try:
                await _send_head(control, LENGTH.pack(len(data)), output)
                await loop.sock_sendall(control, data)
            except OSError as error:
                started.cancel()  # nobody waits for it
                raise ForksLost from error
            except asyncio.CancelledError:
                started.cancel()
                raise
        return await started

    def kill(self) -> None:
        """Kill the server; the kernel does the same to its children, and whoever waits for one hears of it."""
        self._is_ending = True
        self._server.kill()

    def close(self) -> None:
        """Kill the server and, with it, what it has forked and still runs."""
        self.kill()
        if self._reading is not None:
            self._reading.cancel()
        self._server.wait()
        for control in (self._control, *self._old_controls):
            control.close()

    async def _read(self) -> None:
        """Take in what the server says, until it has ended; then start another one, if that is of use."""
        rest = b""
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(self._control, 1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
        except ConnectionError:
            pass  # as an end
        except Exception:
            log.exception("the fork server says what cannot be understood")
        self._lose()

    def _lose(self) -> None:
        """The server has ended, or is to."""
        self._server.kill()
        starting, self._starting = self._starting, deque()
        running, self._running = self._running, {}
        for started in starting:
            if not started.done():
                started.set_exception(ForksLost())
        for child in running.values():
            child.ended.set_result(-signal.SIGKILL)  # by the kernel, as the server had asked
        if self._has_forked and not self._is_ending:
            self._has_forked = False
            self._server.wait()
            try:
                server, control = self._start()
            except OSError as error:  # such as no memory, which may be what has ended that one
                log.error("no other fork server can be started: %s", error)
                return
            self._old_controls.append(self._control)  # an order may be on its way into it, and fails there
            self._server, self._control = server, control
            self._reading = None  # the next order begins to read

    def _hear(self, message: dict[str, int]) -> None:
        if "started" in message:
            self._has_forked = True
            child = self._running[message["started"]] = Forked(message["started"])
            started = self._starting.popleft()
            if started.done():  # nobody waits for it any more
                os.kill(child.pid, signal.SIGKILL)
            else:
                started.set_result(child)
        else:
            self._running.pop(message["ended"]).ended.set_result(message["status"])


async def _send_head(control: socket.socket, head: bytes, output: int) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            socket.send_fds(control, [head], [output])
            return
        except BlockingIOError:  # full of orders for a server that still loads
            has_room = asyncio.Event()
            loop.add_writer(control, has_room.set)
            try:
                await has_room.wait()
            finally:
                loop.remove_writer(control)
