"""Has a prompt that has no token yet computed elsewhere from here on, or here: what its decode worker does.

The router decides (`RedirectRequest`), as long as the prompt waits or is computed. Each full block is computed once:
who goes on fetches by hash what was computed so far, from where it is.

    where the prompt is                       what the redirection does
    its blocks are ordered elsewhere, or      given up: the order is cancelled, what was read of it is let go. Begun
    a prefix is being fetched                 anew with the new targets; whoever had begun it is a source of its prefix
    on its way into the engine                noted: done as soon as the engine has it
    waits in the engine, is computed there    the engine gives it up between two steps, and its full blocks stay in the
                                              cache. Begun anew; this worker is the first source of its prefix
    blocks came whole from elsewhere,         nothing: it is too late
    has a token, leaves, has ended
    already where it shall be                 nothing

`stages.py` has this as a table. What fails behind it leads where it leads without: to the next target, then here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from tandem.v1 import worker_pb2 as pb


def source_of(target: pb.PrefillTarget, num_blocks: int) -> pb.PrefixSource:
    """A prefill worker as a holder of the first blocks of a prompt."""
    return pb.PrefixSource(
        holder_id=target.worker_id,
        incarnation=target.incarnation,
        kv_address=target.kv_address,
        num_blocks=num_blocks,
        tier="device",
    )


class Redirected(Exception):
    """The admission begins anew: its request's targets have changed."""


class Course:
    """Where one request's prompt is computed, was, and shall be. The event loop's."""

    def __init__(self) -> None:
        self.asked = pb.RedirectRequest()
        """The router's latest, which `aim` carries out."""
        self.is_late = False
        """Whether a redirection came while the request was on its way into the engine: it is told again then."""
        self.num_computed_blocks = 0
        """Those that were computed for this request before whoever goes on began: they count as no cached ones."""
        self._at = ""
        self._wanted_at = ""
        self._left: list[pb.PrefixSource] = []  # who has computed a part of the prompt, the latest first
        self._num_held: dict[str, int] = {}  # blocks that these had before that
        self._task: asyncio.Task[object] | None = None
        self._is_interrupted = False
        self._is_aimed = False

    # ---- what the router wants ------------------------------------------------

    def wants_no_change(self, redirect: pb.RedirectRequest, worker_id: str) -> bool:
        """Whether the prompt is where it shall be, or goes there; `worker_id` is the decode worker's own."""
        return self._wanted_at == _first_of(redirect, worker_id)

    def aim(self, order: pb.GenerateRequest, worker_id: str) -> None:
        """Have the order's prompt computed as asked for from here on: an admission that still can begins anew."""
        del order.prefill_targets[:]
        order.prefill_targets.extend(self.asked.prefill_targets)
        self._wanted_at = _first_of(self.asked, worker_id)
        self._is_aimed = True
        if self._task is None:
            self.is_late = True
        elif not self._is_interrupted:
            self._is_interrupted = True
            self._task.cancel()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """A stretch of the admission that a redirection ends. Raises Redirected."""
        task = self._task = asyncio.current_task()
        assert task is not None
        self.is_late = False
        try:
            yield
        except asyncio.CancelledError:
            if not self._is_interrupted:
                raise
            self._is_interrupted = False
            if task.uncancel():
                raise  # by somebody else, too
            raise Redirected from None
        finally:
            self._task = None
            if self._is_interrupted:  # it has broken instead
                self._is_interrupted = False
                self.is_late = True
                task.uncancel()

    # ---- what became of it ------------------------------------------------------

    def goes_to(self, worker_id: str) -> bool:
        """Note who computes the prompt from here on; whether a redirection has brought it there."""
        is_redirected = self._is_aimed and self._at not in ("", worker_id)
        self._at = self._wanted_at = worker_id
        self._is_aimed = False
        return is_redirected

    def begins_here(self, worker_id: str, num_present: int, fetched: Sequence[pb.FetchedPrefix]) -> None:
        """This worker goes on from so many blocks, those that it has `fetched` among them."""
        self.num_computed_blocks = self._num_computed(worker_id, fetched)
        self._num_held[worker_id] = max(0, num_present - self.num_computed_blocks)

    def came(self, worker_id: str, fetched: Sequence[pb.FetchedPrefix]) -> None:
        """Another worker has computed the prompt, from what it had and has `fetched`."""
        self.num_computed_blocks = self._num_computed(worker_id, fetched)

    def ends_at(self, source: pb.PrefixSource) -> None:
        """A worker goes on no more; `source` says what it has.

        What others than this one had before they began is not known: all counts as computed for this request.
        """
        self._num_held.setdefault(source.holder_id, 0)
        others = [other for other in self._left if other.holder_id != source.holder_id]
        self._left = [source, *others] if source.num_blocks else others

    def sources(self, order: pb.GenerateRequest) -> Sequence[pb.PrefixSource]:
        """Who may have a prefix of the prompt, those that have computed it first."""
        return [*self._left, *self.asked.prefix_sources, *order.prefix_sources]

    def _num_computed(self, worker_id: str, fetched: Sequence[pb.FetchedPrefix]) -> int:
        """Counts the blocks that were computed for this request: fetched from who has left it, and its own before."""
        left = {source.holder_id: source.num_blocks - self._num_held[source.holder_id] for source in self._left}
        parts = (part.num_blocks - self._num_held[part.holder_id] for part in fetched if part.holder_id in left)
        return sum(max(0, number) for number in (left.get(worker_id, 0), *parts))


def _first_of(redirect: pb.RedirectRequest, worker_id: str) -> str:
    return redirect.prefill_targets[0].worker_id if redirect.prefill_targets else worker_id
