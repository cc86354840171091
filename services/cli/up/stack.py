"""Runs the stack of `tandem up`: starts the processes, waits until they serve, stops them in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence

from services.cli.embedded_redis import EmbeddedRedis
from services.cli.up.ask import ModelNotLoaded, RequestFailed, connected_workers, send_first_request
from services.cli.up.console import READY, Display
from services.cli.up.forks import Forks
from services.cli.up.private_redis import keep_redis
from services.cli.up.spec import Stack
from services.cli.up.supervise import Child, ChildFailed
from services.startup import CANNOT_START

_READY_RETRY_S = 0.05


async def run_stack(
    stack: Stack,
    display: Display,
    startup_timeout_s: float,
    announce: Callable[[], None],
    redis: EmbeddedRedis | None = None,
    forks: Forks | None = None,
) -> int:
    """Starts the processes, calls `announce` when one request has gone through, runs until a signal, stops them.

    `redis` is the private server, if there is one; it is kept running, too, and closed last. `forks` is who starts
    the workers, if there is one; it stays the caller's. Returns the exit status: 1 if the stack did not come up, 2 if
    a process said what its operator must mend.
    """
    registry = asyncio.create_task(keep_redis(redis, display), name="redis") if redis else None
    try:
        return await _run(stack, display, startup_timeout_s, announce, forks)
    finally:
        if registry is not None:
            registry.cancel()
            await asyncio.gather(registry, return_exceptions=True)


async def _run(
    stack: Stack, display: Display, startup_timeout_s: float, announce: Callable[[], None], forks: Forks | None
) -> int:
    router = Child(stack.router, display)
    # A store node starts and ends as the workers do; it is ready when it has found one.
    workers = [Child(spec, display, forks) for spec in (*stack.workers, *stack.stores)]
    stop = _catch_signals([router, *workers], display)
    running = [asyncio.create_task(child.run(), name=child.spec.name) for child in [router, *workers]]
    waiting = list(workers)
    starting = asyncio.create_task(_started(stack, router, waiting, display), name="start")
    stopped = asyncio.create_task(stop.wait(), name="stop")
    failure, status, is_up = "", 0, False
    try:
        if await _reached(starting, stopped, running, startup_timeout_s):
            display.settled()
            announce()
            is_up = True
            await _reached(stopped, stopped, running, None)
    except ChildFailed as error:
        display.phase(error.name, "failed")
        failure, status = str(error), CANNOT_START if error.status == CANNOT_START else 1
    except RequestFailed as error:
        failure, status = str(error), CANNOT_START if isinstance(error, ModelNotLoaded) else 1
    except TimeoutError:
        late = ", ".join(worker.spec.name for worker in waiting) or "the first request"
        failure, status = f"not ready within {startup_timeout_s:g} s (--startup-timeout-s): {late}", 1
    finally:
        display.settled()
        for task in (starting, stopped):
            task.cancel()
        for child in (router, *workers):
            child.is_muted = bool(failure)  # whatever the others say at their end, the reason was said before
        if is_up:
            await router.stop()  # it finishes what it has taken on, and then the workers have nothing left to do
        await asyncio.gather(*(child.stop() for child in (router, *workers)))
        await asyncio.gather(*running, starting, stopped, return_exceptions=True)
    display.line("tandem", failure or "stopped")
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


async def _started(stack: Stack, router: Child, waiting: list[Child], display: Display) -> None:
    """Returns when the workers serve, the router has a session with each, and one request has gone through.

    Takes the workers that are ready off the list.
    """
    await router.ready.wait()
    while waiting:
        connected = await connected_workers(stack)
        for worker in list(waiting):
            if worker.ready.is_set() and stack.worker_prefix + worker.spec.name in connected:
                display.phase(worker.spec.name, READY, about=worker.about)
                waiting.remove(worker)
        if waiting:
            await asyncio.sleep(_READY_RETRY_S)
    display.phase(router.spec.name, "first request")
    await send_first_request(stack)
    display.phase(router.spec.name, READY)


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
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish stands
            loop.add_signal_handler(number, on_signal, number)
    return stop
