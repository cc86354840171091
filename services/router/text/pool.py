"""Runs what takes time with a client's text in a few threads, fairly: decoding, templates, tokenizing, detokenizing.
What takes none is done at once, by the event loop.

Clients take turns, so that one with a hundred prompts delays another by one of them. Long work leaves a thread to
short work. What nobody waits for any more is dropped, or stops where it next looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kvstore.threads import Threads
from services.router.errors import overloaded

T = TypeVar("T")

LONG_CHARS = 1 << 16
"""Work with so much text is long: some tens of milliseconds."""

SHORT_CHARS = 1 << 11
"""Work with so little text is done sooner than a thread has been woken, and has its turn with the interpreter."""

_FEW_IDS = 1 << 12
"""Looking at so many is done before a thread would have been woken."""

GoOn = Callable[[], None]
"""Work calls it now and then. Raises WorkStopped once nobody waits for the result."""


class WorkStopped(Exception):
    """Nobody waits for it any more."""


class _Stop:
    """Of one job. A thread has this and not the job: an error's traceback holds its frames, and the job the error."""

    def __init__(self) -> None:
        self.is_set = False

    def go_on(self) -> None:
        if self.is_set:
            raise WorkStopped


@dataclass(eq=False)
class _Job:
    client: str
    work: Callable[[GoOn], Any]
    is_long: bool
    done: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_running: bool = False
    stop: _Stop = field(default_factory=_Stop)


@contextlib.contextmanager
def _panics_translated() -> Iterator[None]:
    try:
        yield
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:  # the tokenizers library panics with one that is no Exception
        raise RuntimeError(f"the tokenizer panicked: {error}") from error


def at_once(work: Callable[[GoOn], T]) -> T:
    """The result of short work, done here: nobody can stop it."""
    with _panics_translated():
        return work(lambda: None)


class TokenizerPool:
    """A few threads with a bounded queue before them. Its methods run in the event loop."""

    def __init__(
        self,
        threads: Threads,
        num_threads: int,
        max_queue: int,
        client_share: float = 1.0,
        on_refusal: Callable[[], None] = lambda: None,
    ) -> None:
        """`client_share`: how much of the queue one client may fill."""
        self._executor = threads.pool("tokenizer", num_threads)
        self._num_threads = num_threads
        self._most_long = max(num_threads - 1, 1)
        self._limit = num_threads + max_queue
        self._limit_of_one = math.ceil(self._limit * client_share)
        self._waiting: dict[str, deque[_Job]] = {}  # whose turn it is comes first
        self._running: set[_Job] = set()
        self._on_refusal = on_refusal

    @property
    def num_running(self) -> int:
        """Pieces of work that have a thread."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Those that have none yet."""
        return sum(map(len, self._waiting.values()))

    async def run(self, work: Callable[[GoOn], T], client: str = "", num_chars: int = 0) -> T:
        """The work's result. `num_chars`: of text, by which it is long or not. Raises ApiError 429 when it is full."""
        waiting = self._waiting.get(client, ())
        num_pending = self.num_running + self.num_waiting
        num_own = len(waiting) + sum(job.client == client for job in self._running)
        if num_pending >= self._limit or num_own >= self._limit_of_one:
            self._on_refusal()
            raise overloaded(f"{num_pending} prompts wait for the tokenizer, {num_own} of them yours. Try again later.")
        job = _Job(client, work, num_chars >= LONG_CHARS)
        self._waiting.setdefault(client, deque()).append(job)
        self._start()
        try:
            with _panics_translated():
                result: T = await job.done
        finally:
            self._leave(job)
            del job, work  # an error's traceback holds this frame, and the job holds the error
        return result

    def of(self, client: str) -> ClientPool:
        """The pool as one client has it."""
        return ClientPool(self, client)

    def close(self) -> None:
        """Waits for nothing: what has not begun is dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _leave(self, job: _Job) -> None:
        job.stop.is_set = True
        if not job.is_running:
            self._drop(job)

    def _drop(self, job: _Job) -> None:
        jobs = self._waiting[job.client]
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.client]

    def _start(self) -> None:
        while len(self._running) < self._num_threads and (job := self._next()) is not None:
            self._drop(job)
            if job.client in self._waiting:  # its next one comes after everybody else's
                self._waiting[job.client] = self._waiting.pop(job.client)
            job.is_running = True
            self._running.add(job)
            work = asyncio.get_running_loop().run_in_executor(self._executor, job.work, job.stop.go_on)
            work.add_done_callback(lambda work, job=job: self._ended(job, work))  # type: ignore[misc]

    def _next(self) -> _Job | None:
        takes_long = sum(job.is_long for job in self._running) < self._most_long
        for jobs in self._waiting.values():
            for job in jobs:
                if takes_long or not job.is_long:
                    return job
        return None

    def _ended(self, job: _Job, work: asyncio.Future[Any]) -> None:
        self._running.remove(job)
        self._start()
        if work.cancelled():
            job.done.cancel()
        elif (error := work.exception()) is not None:
            if not job.done.done():
                job.done.set_exception(error)
                job.done.exception()  # whoever waited has seen it, or has gone
        elif not job.done.done():
            job.done.set_result(work.result())


@dataclass(frozen=True)
class ClientPool:
    """One client's turns in the pool."""

    pool: TokenizerPool
    client: str

    async def run(self, work: Callable[[GoOn], T], num_chars: int = 0) -> T:
        """As `TokenizerPool.run`."""
        return await self.pool.run(work, self.client, num_chars)

    async def look_at(self, work: Callable[[], T], num_ids: int) -> T:
        """The result of work that looks at so many token ids: here where they are few, else as `run`."""
        return work() if num_ids <= _FEW_IDS else await self.run(lambda go_on: work(), num_ids)
