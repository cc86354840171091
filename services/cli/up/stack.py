"""Runs the stack of `tandem up`: starts the processes, waits until they serve, stops them in order."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import Callable, Sequence

from services.cli.embedded_redis import EmbeddedRedis
from services.cli.up.console import Display
from services.cli.up.private_redis import keep_redis
from services.cli.up.spec import Stack
from services.cli.up.supervise import Child, ChildFailed

_READY_RETRY_S = 0.2
_HTTP_TIMEOUT_S = 5.0


async def run_stack(
    stack: Stack,
    display: Display,
    startup_timeout_s: float,
    announce: Callable[[], None],
    redis: EmbeddedRedis | None = None,
) -> int:
    """Starts the processes, calls `announce` when the router is ready, keeps them running until a signal, stops them.

    `redis` is the private server, if there is one; it is kept running, too, and closed last. Returns the exit status:
    1 if the stack did not come up.
    """
    registry = asyncio.create_task(keep_redis(redis, display), name="redis") if redis else None
    try:
        return await _run(stack, display, startup_timeout_s, announce)
    finally:
        if registry is not None:
            registry.cancel()
            await asyncio.gather(registry, return_exceptions=True)


async def _run(stack: Stack, display: Display, startup_timeout_s: float, announce: Callable[[], None]) -> int:
    router = Child(stack.router, display)
    # A store node starts and ends as the workers do; it is ready when it has found one.
    workers = [Child(spec, display) for spec in (*stack.workers, *stack.stores)]
    stop = _catch_signals([router, *workers], display)
    running = [asyncio.create_task(child.run(), name=child.spec.name) for child in [router, *workers]]
    starting = asyncio.create_task(_started(stack, router, workers), name="start")
    stopped = asyncio.create_task(stop.wait(), name="stop")
    status = 0
    try:
        if await _reached(starting, stopped, running, startup_timeout_s):
            display.settled()
            announce()
            await _reached(stopped, stopped, running, None)
    except ChildFailed as failure:
        display.settled()
        status = 1
        display.line("tandem", f"{failure}; its last lines:")
        for line in failure.lines:
            display.line(failure.name, line)
    except TimeoutError:
        waiting = [worker.spec.name for worker in workers if not worker.ready.is_set()] or ["the router's GET /ready"]
        status = 1
        display.line("tandem", f"not ready within {startup_timeout_s:g} s (--startup-timeout-s): {', '.join(waiting)}")
    finally:
        display.settled()
        for task in (starting, stopped):
            task.cancel()
        await _stop_in_order(router, workers)
        await asyncio.gather(*running, starting, stopped, return_exceptions=True)
    return status


async def _reached(
    goal: asyncio.Task[None] | asyncio.Task[bool],
    stopped: asyncio.Task[bool],
    running: Sequence[asyncio.Task[None]],
    timeout_s: float | None,
) -> bool:
    """Whether the goal was reached before the stop. Raises what a child or the goal raises, and TimeoutError."""
    done, _ = await asyncio.wait({goal, stopped, *running}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    if not done:
        raise TimeoutError
    for task in done:
        task.result()
    return goal in done


async def _started(stack: Stack, router: Child, workers: Sequence[Child]) -> None:
    """Returns when the workers serve and the router knows them."""
    await asyncio.gather(*(worker.ready.wait() for worker in workers))
    # The router says when it listens, not when it has found its workers: so it must be asked.
    while not await is_ready(stack):  # noqa: ASYNC110
        await asyncio.sleep(_READY_RETRY_S)
    router.ready.set()


async def is_ready(stack: Stack) -> bool:
    """Whether the router's GET /ready answers 200."""
    context = ssl._create_unverified_context() if stack.has_tls else None  # our own router, on this machine
    try:
        async with asyncio.timeout(_HTTP_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(stack.reachable_host, stack.port, ssl=context)
            try:
                writer.write(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                status_line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status_line.split()[1:2] == [b"200"]


async def _stop_in_order(router: Child, workers: Sequence[Child]) -> None:
    """The router first, which finishes what it has taken on; then the workers, which have nothing left to do."""
    await router.stop()
    await asyncio.gather(*(worker.stop() for worker in workers))


def _catch_signals(children: Sequence[Child], display: Display) -> asyncio.Event:
    """An event that the first signal sets; the second kills the children."""
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            for child in children:
                child.kill()
            return
        stop.set()
        display.line("tandem", f"{number.name}: stopping; once more to stop at once")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal, number)
    return stop
