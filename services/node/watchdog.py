"""Watches from a thread of its own that this process gets on, says so where it does not, and ends it in the end.

A thread, since an event loop that hangs cannot look at itself. What it cannot see is a call into C that never gives the
interpreter back: then nothing here runs, and peers (by the silence) and whoever asks for `/health` find out.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import glob
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

from prometheus_client import CollectorRegistry

from kvstore.exchange import BlockExchange
from kvstore.threads import Threads
from services.metric_families import NODE
from services.progress import Progress, Watch
from services.startup import STUCK

log = logging.getLogger(__name__)

_INTERVAL_S = 0.25
_LAST_WORDS_S = 2.0


def loop_watch(allowed_s: float) -> Watch:
    """Watch the running event loop: it has to come round to a callback of ours, again and again."""
    loop, num_sent = asyncio.get_running_loop(), 0

    def ask() -> bool:
        nonlocal num_sent
        if watch.num_advances == num_sent:
            num_sent += 1
            with contextlib.suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(watch.advanced)
        return True

    watch = Watch("event_loop", ask, lambda: allowed_s)
    return watch


def transport_watches(
    exchange: BlockExchange, allowed_s: float, is_needed: Callable[[], bool] = lambda: True
) -> list[Watch]:
    """Watch the transports that have a thread of their own: it has to come round, too.

    A process whose transports all stand still is worth a new start if one `is_needed`.
    """
    names = exchange.transport_turns()
    return [_transport_watch(exchange, name, allowed_s, lambda: is_needed() and not exchange.gets_on) for name in names]


def hindering(parts: Sequence[str], exchange: BlockExchange, is_transport_needed: bool = True) -> tuple[str, ...]:
    """Have blocks go over the transports that get on; return what else of `parts`, which stand still, is in the way.

    A transport is not while another one works, nor where none is needed.
    """
    exchange.note_still(parts)
    if is_transport_needed and not exchange.gets_on:
        return tuple(parts)
    return tuple(part for part in parts if part not in exchange.transport_names)


def in_words(parts: Sequence[str]) -> str:
    """Names of parts for people; empty where there are none."""
    return ", ".join(part.replace("_", " ") for part in parts)


def _transport_watch(exchange: BlockExchange, name: str, allowed_s: float, is_curable: Callable[[], bool]) -> Watch:
    def has_work() -> bool:
        watch.num_advances = exchange.transport_turns().get(name, 0)
        return watch.num_advances > 0  # else it is being made anew, which is its own affair

    watch = Watch(name, has_work, lambda: allowed_s, is_curable)
    return watch


class _Starvation:
    """Reads how long our threads were ready to run and had to wait, from Linux's books; elsewhere they never do."""

    def __init__(self) -> None:
        self._waited_ns: dict[str, int] = {}

    def take_s(self) -> float:
        """Return how long the thread that waited longest has since the last call."""
        before_ns, self._waited_ns = self._waited_ns, {}
        for path in glob.iglob("/proc/self/task/*/schedstat"):
            # Suppressed: it has just ended, or nobody keeps these books.
            with contextlib.suppress(OSError, ValueError, IndexError), open(path) as file:
                self._waited_ns[path] = int(file.read().split()[1])
        waits_ns = [waited_ns - before_ns.get(path, waited_ns) for path, waited_ns in self._waited_ns.items()]
        return max(waits_ns, default=0) / 1e9


class Watchdog:
    """Looks every quarter of a second. Any thread may ask it."""

    def __init__(
        self,
        watches: Sequence[Watch],
        exit_s: float,
        threads: Threads,
        on_change: Callable[[tuple[str, ...]], None],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """`on_change` hears in the event loop which parts stand still; none: nothing does any more.

        `exit_s`: after a standstill of so much more than allowed the process ends by `end`; 0: never.
        """
        self.stuck = ""
        self._progress = Progress(watches, _INTERVAL_S)
        self._exit_s = exit_s
        self._on_change = on_change
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._starvation = _Starvation()
        self._is_counting = False  # who waits for a processor: nobody asks while nothing stands still
        self._is_broken = False
        # Of its own: who hangs may hold a log handler's lock, or our output may be full.
        self._words = threads.pool("watchdog-words")

    def still_s(self) -> dict[str, float]:
        """Seconds that each part has stood still although it had work."""
        return self._progress.still_s()

    def turn(self) -> bool:
        """Wait, and look. Returns True: there is a next turn."""
        time.sleep(_INTERVAL_S)
        try:
            starved_s = self._starvation.take_s() if self._is_counting else 0.0
            self.look(time.monotonic(), starved_s)
            is_still = any(self._progress.still_s().values())
            if is_still and not self._is_counting:
                self._starvation.take_s()  # what was before is not counted
            self._is_counting = is_still
            self._is_broken = False
        except Exception as error:
            # A bug of ours costs a look, and not the watch: the next one may go well. It is said once.
            if not self._is_broken:
                with contextlib.suppress(RuntimeError):  # it is closed, and this look had begun before
                    self._words.submit(log.error, "the watchdog cannot look, and tries on", exc_info=error)
            self._is_broken = True
        return True

    def look(self, now_s: float, starved_s: float = 0.0) -> None:
        """Look once. Since the last time a thread of ours has waited `starved_s` for a processor."""
        self._progress.look(now_s, starved_s)
        names = self._progress.stuck()
        stuck = in_words(names)
        if stuck != self.stuck:
            self.stuck = stuck
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._on_change, names)
            self._words.submit(log.error if stuck else log.warning, "no progress of: %s", stuck or "nothing any more")
        if self._exit_s and (overdue := self._progress.overdue(self._exit_s)):
            saying = self._words.submit(_say_where, overdue)
            with contextlib.suppress(TimeoutError):
                saying.result(_LAST_WORDS_S)
            self._end(STUCK)

    def close(self) -> None:
        """Nothing is said any more."""
        self._words.shutdown(wait=False)


def _say_where(names: Sequence[str]) -> None:
    log.critical("ending with status %d: no progress of %s, although there was work", STUCK, ", ".join(names))
    faulthandler.dump_traceback(all_threads=True)


class ProgressMetrics:
    """Exports what the watchdog sees."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._still_s = NODE.gauge("tandem:stuck_seconds", registry)

    def watch(self, dog: Watchdog) -> None:
        """Register where to read, at scrape time."""
        for part in dog.still_s():
            self._still_s.labels(part).set_function(partial(_still_s, dog, part))


def _still_s(dog: Watchdog, part: str) -> float:
    return dog.still_s()[part]


@asynccontextmanager
async def watched(
    watches: Sequence[Watch], exit_s: float, threads: Threads, on_change: Callable[[tuple[str, ...]], None]
) -> AsyncIterator[Watchdog]:
    """A watchdog that runs while the body does."""
    dog = Watchdog(watches, exit_s, threads, on_change)
    runner = threads.start("watchdog", dog.turn)
    try:
        yield dog
    finally:
        await runner.stop(2 * _INTERVAL_S + _LAST_WORDS_S)
        dog.close()
