"""Runs a router as several processes on one port: takes the port, starts them, keeps them running, passes signals on.

The parent serves nothing itself. All processes accept from its one listening socket, so that whichever is free takes
the next connection, and one that dies or hangs costs nobody's connection but those that it has accepted.

    what happens                             what the parent does
    a process ends before it ever served     the others end, and so does the parent, with its status
    a process ends later, however            starts it again: at once, and after growing pauses where that repeats
    a process says nothing for `_SILENT_S`   kills it, and starts it again
    SIGTERM or SIGINT to the parent          closes the port, has all processes drain, kills what is left
    the parent dies                          the processes hear of it, and drain
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import msgspec

from services.logs import configure_logging, detail_level, report_phase, report_ready
from services.restarts import STABLE_S, describe_exit, restart_delay_s
from services.router.config import RouterConfig
from services.router.listening import listen
from services.router.processes.channel import Channel
from services.router.processes.hub import Hub
from services.router.processes.messages import Answer, Ask, Serving, Start, ToParent
from services.startup import CANNOT_START, CannotListen, address_of

log = logging.getLogger(__name__)

_START_S: Final = 120.0
"""How long a process may take to serve."""
_SILENT_S: Final = 30.0
"""A process beats each second. One that is silent for so long hangs; probes would not see it: others answer them."""
_EXTRA_GRACE_S: Final = 4.0
"""Beyond the time to drain, until what is left is killed: for last words to clients."""
_DECODER = msgspec.msgpack.Decoder(ToParent)


class ProcessFailed(Exception):
    """A process has ended before it ever served."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def run_processes(config: RouterConfig) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status."""
    configure_logging(config.log_level, config.log_format, fields={"role": "router"})
    try:
        listener = listen(config.host, config.port)
    except OSError as error:
        log.error("router cannot start: %s", CannotListen(config.host, config.port, "--port", error.strerror))
        return CANNOT_START
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if config.router_workers > num_cores:
        log.warning("--router-workers %d: this machine has %d cores for them", config.router_workers, num_cores)
    with listener:
        return asyncio.run(Parent(config, listener).run())


class Parent:
    """Keeps the processes of one router."""

    def __init__(
        self,
        config: RouterConfig,
        listener: socket.socket,
        silent_s: float = _SILENT_S,
        delay_s: Callable[[int], float] = restart_delay_s,
    ) -> None:
        self._config = config
        self._listener = listener
        scheme = "https" if config.ssl_certfile else "http"
        self._url = f"{scheme}://{address_of(config.host, listener.getsockname()[1])}"
        self._silent_s = silent_s
        self._delay_s = delay_s
        self._hub = Hub()
        self._stop = asyncio.Event()
        self._unready = set(range(1, config.router_workers + 1))
        """Numbers of which none has served yet."""

    async def run(self) -> int:
        """Until a signal; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        stopped = asyncio.create_task(self._stop.wait(), name="wait-for-signal")
        keepers = [asyncio.create_task(self._keep(number), name=f"process {number}") for number in self._unready]
        await asyncio.wait([stopped, *keepers], return_when=asyncio.FIRST_COMPLETED)
        self._stop.set()
        self._listener.close()  # else the kernel would go on taking connections that nobody accepts
        log.log(detail_level(), "stopping; running requests have %g s", self._config.shutdown_timeout_s)
        results = await asyncio.gather(*keepers, return_exceptions=True)
        await stopped
        for error in results:
            if isinstance(error, ProcessFailed):
                return error.status
            if error is not None:
                log.error("the router's parent crashed", exc_info=error)
                return 1
        return 0

    async def _keep(self, number: int) -> None:
        """Runs the process of a number, again and again, until the stop. Raises ProcessFailed."""
        num_failures = 0
        while not self._stop.is_set():
            started_s = asyncio.get_running_loop().time()
            status = await self._run_once(number)
            if self._stop.is_set():
                return
            if number in self._unready:
                if status != CANNOT_START:  # else it has said why, and these shall be the last words
                    log.error("process %d %s before it served", number, describe_exit(status))
                raise ProcessFailed(status if status > 0 else 1)
            is_stable = asyncio.get_running_loop().time() - started_s > STABLE_S
            num_failures = 1 if is_stable else num_failures + 1
            pause_s = self._delay_s(num_failures)
            log.warning("process %d %s; starting it again in %g s", number, describe_exit(status), pause_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause_s)

    async def _run_once(self, number: int) -> int:
        """A process from its start to its end; returns its exit status, negative for a signal."""
        ours, theirs = socket.socketpair()
        with theirs:
            inherited = (theirs.fileno(), self._listener.fileno())
            safe_path = ["-P"] if sys.flags.safe_path else []
            command = [sys.executable, *safe_path, "-m", __package__, str(number), *map(str, inherited)]
            try:
                process = await asyncio.create_subprocess_exec(
                    *command, pass_fds=inherited, stdin=asyncio.subprocess.DEVNULL
                )
            except OSError as error:  # such as no memory
                ours.close()
                log.error("process %d cannot be started: %s", number, error.strerror)
                return 1
        channel = await Channel.open(ours, _DECODER)
        is_replacement = number not in self._unready and self._hub.num_serving > 0
        channel.send(Start(number, self._config.router_workers, is_replacement, divided(self._config)))
        listening = asyncio.create_task(self._listen(number, channel), name=f"word of process {number}")
        ended = asyncio.create_task(process.wait(), name=f"end of process {number}")
        stopped = asyncio.create_task(self._stop.wait(), name=f"stop of process {number}")
        try:
            await asyncio.wait([ended, stopped, listening], return_when=asyncio.FIRST_COMPLETED)
            if listening.done() and not (ended.done() or stopped.done()):
                # It has closed its end, or has been silent for too long: it ends, or it is made to.
                if await listening:
                    _signal(process, signal.SIGKILL)
                patience_s = self._config.shutdown_timeout_s + _EXTRA_GRACE_S
                await asyncio.wait([ended, stopped], timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                _signal(process, signal.SIGTERM)
                await asyncio.wait([ended], timeout=self._config.shutdown_timeout_s + _EXTRA_GRACE_S)
            if not ended.done():
                log.error("process %d did not stop in time: killed", number)
                _signal(process, signal.SIGKILL)
            return await ended
        finally:
            for task in (listening, stopped):
                task.cancel()
            await asyncio.gather(listening, stopped, return_exceptions=True)
            self._hub.leave(number)
            channel.close()

    async def _listen(self, number: int, channel: Channel[ToParent]) -> bool:
        """Takes in what a process says, until it has closed its end; True: it is to be killed."""
        serves = False
        while True:
            try:
                async with asyncio.timeout(self._silent_s if serves else _START_S):
                    message = await channel.receive()
            except TimeoutError:
                log.error("process %d says nothing any more: it hangs, and is killed", number)
                return True
            if message is None:
                return False
            if isinstance(message, Serving):
                serves = True
                self._hub.join(number, channel)
                self._on_serving(number)
            elif isinstance(message, Ask):
                self._hub.asked(channel, message)
            elif isinstance(message, Answer):
                self._hub.answered(message)

    def _on_serving(self, number: int) -> None:
        was_starting = bool(self._unready)
        self._unready.discard(number)
        if not was_starting:
            log.info("process %d serves again", number)
        elif not self._unready:
            log.log(detail_level(), "listening on %s, %d processes", self._url, self._config.router_workers)
            report_phase("waiting for workers")
            report_ready(url=self._url)


def divided(config: RouterConfig) -> RouterConfig:
    """The settings of each process: of what bounds the router as a whole, its part."""
    num_parts = config.router_workers
    return replace(
        config,
        router_workers=1,
        max_concurrent_requests=-(-config.max_concurrent_requests // num_parts),
        max_queue=-(-config.max_queue // num_parts),
        request_memory_bytes=-(-config.request_memory_bytes // num_parts),
        worker_backlog_s=config.worker_backlog_s / num_parts,
    )


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
