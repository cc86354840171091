"""Keeps processes running: starts them, reads their output, restarts one that dies, stops them.

A process that ends before it has ever served raises `ChildFailed`: something is wrong that trying again does not cure.
One that ends later is started again: at once, and after a pause that doubles where it ends again and again. On Linux no
child outlives the launcher, even if that is killed (see forks/child.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from services.cli.up.console import READY, Display
from services.cli.up.forks import SHIM, Forks, ForksLost
from services.cli.up.spec import ChildSpec
from services.logs import parse_phase, parse_ready
from services.restarts import STABLE_S, describe_exit, restart_delay_s

_MAX_LINE_BYTES = 1 << 20
_KEPT_LINES = 20
_LAST_OUTPUT_S = 2.0
_REST_S = 10.0
"""For so long what a process has left running may take to end by itself."""

_LOG_PREFIX = re.compile(r"\d\d:\d\d:\d\d\.\d{3} [A-Z]+ [\w.]+: ")


class ChildFailed(Exception):
    """A process ended before it ever served; the message has its last words."""

    def __init__(self, name: str, status: int, last_words: str) -> None:
        super().__init__(f"{name} {describe_exit(status)} before it was ready: {last_words or 'it said nothing'}")
        self.name, self.status = name, status


def last_words(lines: Iterable[str]) -> str:
    """The last thing that a process said: the message of its log record, or the end of its traceback."""
    said = next((line.strip() for line in reversed(list(lines)) if line.strip()), "")
    try:
        entry = json.loads(said)
    except ValueError:
        return _LOG_PREFIX.sub("", said, count=1)
    if not isinstance(entry, dict):
        return said
    exception = str(entry.get("exception", "")).strip().splitlines()
    return ": ".join([str(entry.get("message", "")), *exception[-1:]])


class Process(Protocol):
    """A program that runs, in a session of its own."""

    @property
    def pid(self) -> int: ...

    async def wait(self) -> int:
        """Return the exit status, negative for a signal."""

    def terminate(self) -> None:
        """Send SIGTERM. Raises ProcessLookupError."""


@dataclass
class Child:
    """Supervises one program. `run()` owns the process; `stop()` makes `run()` return.

    With `forks`, a program that may be forked is; it is started as others are where that server is lost.
    """

    spec: ChildSpec
    display: Display
    forks: Forks | None = None
    delay_s: Callable[[int], float] = restart_delay_s
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    about: str = ""
    """What it says of itself once it serves: its page, and for a worker what it computes with."""
    is_muted: bool = False
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _process: Process | None = None
    _starting: asyncio.Task[Process] | None = None
    _lines: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))

    @property
    def pid(self) -> int | None:
        """The process id, None while no process runs."""
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Starts the program, again and again, until `stop()`. Raises ChildFailed if it never became ready."""
        num_failures = 0
        while not self._stopping.is_set():
            started_s = time.monotonic()
            status = await self._run_once()
            if self._stopping.is_set():
                return
            if not self.ready.is_set():
                raise ChildFailed(self.spec.name, status, last_words(self._lines))
            num_failures = 1 if time.monotonic() - started_s > STABLE_S else num_failures + 1
            pause_s = self.delay_s(num_failures)
            self.display.line(self.spec.name, f"{describe_exit(status)}; starting it again in {pause_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)

    async def stop(self, grace_s: float | None = None) -> None:
        """SIGTERM, and after `grace_s` SIGKILL; returns when the process is gone."""
        self._stopping.set()
        process = self._process
        if process is None:
            if self._starting is not None:
                self._starting.cancel()
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        grace_s = self.spec.grace_s if grace_s is None else grace_s
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            self.display.line(self.spec.name, f"did not stop within {grace_s:g} s: killed")
            _signal_group(process, signal.SIGKILL)
            try:
                await asyncio.wait_for(process.wait(), _LAST_OUTPUT_S)
            except TimeoutError:  # whoever should tell of its end hangs
                self.kill()
                await process.wait()

    def kill(self) -> None:
        """SIGKILL, to the program and whatever it has started, and to the fork server. `run()` returns soon after."""
        self._stopping.set()
        if self.forks is not None:  # one that hangs would not tell of the end
            self.forks.kill()
        if self._process is not None:
            _signal_group(self._process, signal.SIGKILL)
        elif self._starting is not None:
            self._starting.cancel()

    async def _run_once(self) -> int:
        """Runs it from start to exit; returns the exit status, negative for a signal."""
        # Our own pipe: with asyncio's, wait() would last until everybody who inherited it had closed it.
        read_end, write_end = os.pipe()
        self.display.phase(self.spec.name, "starting")
        self._starting = asyncio.create_task(self._start(write_end), name=f"start {self.spec.name}")
        try:
            process = await self._starting
        except BaseException:
            os.close(read_end)
            if self._stopping.is_set() and self._starting.cancelled():
                return 0
            raise
        finally:
            os.close(write_end)
        self._process = process
        if self._stopping.is_set():  # stop() came while it started, and found nothing to stop
            _signal_group(process, signal.SIGKILL)
        output = asyncio.create_task(self._read_all(read_end), name=f"read {self.spec.name}")
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait([ended, output], return_when=asyncio.FIRST_COMPLETED)
            if output.done():
                output.result()  # what nobody reads any more would hold it up once the pipe is full
            return await ended
        finally:
            ended.cancel()
            if _signal_group(process, signal.SIGTERM):  # it left something running
                # Python's keeper of shared memory does not heed it: that ends last, and removes what the others left.
                await asyncio.wait([output], timeout=_REST_S)
                _signal_group(process, signal.SIGKILL)
            await process.wait()
            self._process = None
            with contextlib.suppress(TimeoutError):  # somebody who left the group may still hold the pipe
                await asyncio.wait_for(output, _LAST_OUTPUT_S)

    async def _start(self, output: int) -> Process:
        if self.forks is not None and self.spec.is_forked:
            try:
                return await self.forks.fork(self.spec, output)
            except ForksLost:
                self.display.line(self.spec.name, "the fork server has ended: starting without it")
        cores = ",".join(str(core) for core in self.spec.cores)
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", SHIM, str(os.getpid()), cores, *self.spec.argv),
            env=dict(self.spec.environ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # a terminal's Ctrl-C is for the launcher alone, which then stops the others
        )

    async def _read_all(self, read_end: int) -> None:
        reader = asyncio.StreamReader()
        with os.fdopen(read_end, "rb") as pipe:
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), pipe
            )
            try:
                async for line in _lines(reader):
                    self._read(line)
            finally:
                transport.close()

    def _read(self, line: str) -> None:
        phase, facts = parse_phase(line), parse_ready(line)
        if phase is not None:
            if not self._stopping.is_set():
                self.display.phase(self.spec.name, *phase)
        elif facts is not None:
            page = f"http://{facts['http']}" if "http" in facts else ""
            self.about = ", ".join(filter(None, [page, str(facts.get("about", ""))]))
            if self.ready.is_set():  # again; of the first time the launcher speaks, once the router knows it
                self.display.phase(self.spec.name, READY, about=self.about)
            self.ready.set()
        else:
            self._lines.append(line)
            if not self.is_muted:
                self.display.line(self.spec.name, line)


def _signal_group(process: Process, number: signal.Signals) -> bool:
    """Send it to the process and whatever it has started; False where all are gone already."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of a process's output. One that is too long is cut in pieces, the last may lack its end."""
    rest = b""
    while chunk := await stream.read(1 << 16):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").rstrip("\r")
        if len(rest) > _MAX_LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")
