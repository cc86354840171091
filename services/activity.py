"""Says every ten seconds how busy a process is, in the words of vLLM's line, from the series that it exports anyway.

Silent while nothing happens: only the first line of a quiet time is shown, with its zeros. Under `tandem up` the
router speaks for the whole fleet.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

log = logging.getLogger(__name__)

_INTERVAL_S = 10.0
_MAX_HANDOFFS = 4096  # of an interval: the median of more is that of the last ones


def recent_handoffs() -> deque[float]:
    """A place for the seconds of handoffs, from where the line takes them."""
    return deque(maxlen=_MAX_HANDOFFS)


@dataclass(frozen=True)
class Sample:
    """A process's series at one moment: totals since its start, except for the gauges."""

    prompt_tokens: float = 0.0
    generation_tokens: float = 0.0
    prefix_queries: float = 0.0
    prefix_hits: float = 0.0
    num_running: float = 0.0  # a gauge, as are the two below
    num_waiting: float = 0.0
    kv_usage: float = 0.0


_SERIES = {
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
    "vllm:num_requests_running": "num_running",
    "vllm:num_requests_waiting": "num_waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
}


def sample(registry: CollectorRegistry) -> Sample:
    """The series of all models together; of the KV caches' use, the highest."""
    values = dict.fromkeys(_SERIES.values(), 0.0)
    for family in registry.collect():
        for each in family.samples:
            name = _SERIES.get(each.name)
            if name == "kv_usage":
                values[name] = max(values[name], each.value)
            elif name is not None:
                values[name] += each.value
    return Sample(**values)


@dataclass
class Activity:
    """Makes the lines of one process, each of what has happened since the one before."""

    read: Callable[[], Sample]
    handoffs_s: deque[float]
    own_tokens: int = 0
    """What the launcher generates to see whether all is well: nothing to speak of."""
    clock: Callable[[], float] = time.monotonic
    _before: Sample = field(init=False)
    _since_s: float = field(init=False)
    _hit_rate: float = 0.0
    _was_busy: bool = False

    def __post_init__(self) -> None:
        self._before, self._since_s = self.read(), self.clock()

    def line(self) -> str:
        """The next line; empty for silence."""
        now, now_s, before = self.read(), self.clock(), self._before
        prompt = now.prompt_tokens - before.prompt_tokens
        generated = now.generation_tokens - before.generation_tokens
        queries = now.prefix_queries - before.prefix_queries
        if queries:  # else the rate of the last prompts still stands
            self._hit_rate = (now.prefix_hits - before.prefix_hits) / queries
        seconds = max(now_s - self._since_s, 1e-9)
        self._before, self._since_s = now, now_s
        handoffs_s = list(self.handoffs_s)
        self.handoffs_s.clear()
        is_own = now.generation_tokens + now.num_running + now.num_waiting <= self.own_tokens
        is_busy = any((prompt, generated, now.num_running, now.num_waiting)) and not is_own
        is_shown, self._was_busy = is_busy or self._was_busy, is_busy
        if not is_shown:
            return ""
        parts = [
            f"Avg prompt throughput: {prompt / seconds:.1f} tokens/s",
            f"Avg generation throughput: {generated / seconds:.1f} tokens/s",
            f"Running: {now.num_running:.0f} reqs",
            f"Waiting: {now.num_waiting:.0f} reqs",
            f"GPU KV cache usage: {now.kv_usage:.1%}",
            f"Prefix cache hit rate: {self._hit_rate:.1%}",
        ]
        if handoffs_s:
            parts.append(f"Handoff p50: {statistics.median(handoffs_s) * 1e3:.1f} ms")
        return ", ".join(parts)


@asynccontextmanager
async def activity_logged(line: Callable[[], str], level: int, interval_s: float = _INTERVAL_S) -> AsyncIterator[None]:
    """Log at `level`, every ten seconds within, what `line` returns, if it is not empty."""

    async def log_lines() -> None:
        while True:
            await asyncio.sleep(interval_s)
            if log.isEnabledFor(level) and (text := line()):
                log.log(level, text)

    task = asyncio.create_task(log_lines(), name="activity")
    task.add_done_callback(_on_end)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)  # a crash was logged when it happened


def _on_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("how busy this process is will not be logged any more", exc_info=error)
