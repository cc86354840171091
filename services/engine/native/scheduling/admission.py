"""Chooses who enters the next batch, and with which blocks: queued requests and reservations.

Pure, a part of `scheduler.py`: keeps the rules 3 to 5 of that module's docstring.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.block import BlockHash
from kvstore.pool import BlockPool
from kvstore.protocol import Reservation
from services.engine.api import EngineStats
from services.engine.native.scheduling.batch import BatchBuilder
from services.engine.native.scheduling.block_tables import take_blocks
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.prefix_reuse import (
    follows_running_prompt,
    hashes_being_computed,
    reuse_cached_tokens,
    uncomputed_hashes,
)
from services.engine.native.scheduling.queues import RequestQueues
from services.engine.native.scheduling.request import Request, RequestStatus


class Admission:
    """Lets requests in, as memory, places and the step's budget allow."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool, queues: RequestQueues, stats: EngineStats) -> None:
        self._config = config
        self._pool = pool
        self._queues = queues
        self._stats = stats
        # Found by the last step: the queue's head waits for blocks or a place, not for budget. So no later
        # reservation may take what becomes free before the next step has looked again.
        self._queue_is_stuck = False
        self._something_changed = True  # since that step

    @property
    def may_admit(self) -> bool:
        """Whether the next step can be expected to let one of the queue in."""
        return bool(self._queues.waiting) and (self._something_changed or not self._queue_is_stuck)

    def note_change(self) -> None:
        """Something came, went or became free: a queue that was stuck may move on."""
        self._something_changed = True

    def admit_queue(self, step: BatchBuilder) -> None:
        """Let the queue's requests in, in order, and schedule what the step's budget allows of their prompts."""
        waiting, reserving = self._queues.waiting, self._queues.reserving
        self._queue_is_stuck = self._something_changed = False
        being_computed: set[BlockHash] = set()
        if waiting:
            being_computed = hashes_being_computed((e.request for e in self._queues.running), self._config)
        for entry in list(waiting):
            request = entry.request
            if step.budget == 0:
                return
            if follows_running_prompt(self._pool, request, being_computed):
                continue
            room = step.room(request, self._start_of(request)) if step.prompt_budget.is_bounded else step.budget
            if room == 0:
                return
            if (reserving and reserving[0] < entry) or not self._start(request, step):
                self._queue_is_stuck = True
                return
            being_computed.update(uncomputed_hashes(request, self._config))
            if not step.add_chunk(request, room):
                return

    def grant_reservations(self) -> list[tuple[Request, Reservation]]:
        """Give blocks for their whole prompts to those whose turn it is, lent to the caller. Between steps only."""
        waiting, reserving = self._queues.waiting, self._queues.reserving
        granted: list[tuple[Request, Reservation]] = []
        while reserving:
            request = reserving[0].request
            if self._queue_is_stuck and waiting and waiting[0] < reserving[0]:
                break
            blocks = self._take_blocks(request, request.block_hashes)
            if blocks is None:
                break
            self._queues.move(request, RequestStatus.RESERVED)
            self._something_changed = True
            granted.append((request, blocks))
        return granted

    def next_prefixes(self, max_requests: int) -> list[Sequence[BlockHash]]:
        """Identities of the full blocks of those who wait, in order, for whoever can bring some of them back.

        The first one's, and those of who could begin with it: what comes back for one must not cost another's. None
        where there is no place for them. Requests that use no cached blocks are left out. Between steps only.
        """
        if self._queues.num_in_batch >= self._config.max_rows:
            return []
        first = [*self._queues.waiting[:max_requests], *self._queues.reserving[:max_requests]]
        room = self._pool.num_free - self._queues.num_in_batch
        prefixes: list[Sequence[BlockHash]] = []
        for index, entry in enumerate(sorted(first)[:max_requests]):
            room -= self._config.num_blocks_for(entry.request.num_tokens) + 1
            if index > 0 and room < 0:
                break
            if not entry.request.wants_prompt_logprobs:
                prefixes.append(entry.request.block_hashes)
        return prefixes

    def take_prefix(self, hashes: Sequence[BlockHash]) -> Reservation | None:
        """A block per hash, cached ones and new ones; None, taking nothing, where the running ones need the room."""
        return take_blocks(self._pool, hashes, len(hashes), headroom=self._queues.num_in_batch)

    def _start_of(self, request: Request) -> int:
        """Where the prompt would be computed from if it were let in now, to the block."""
        if request.wants_prompt_logprobs:
            return 0
        num_found = self._pool.peek_prefix(request.block_hashes) * self._config.block_size
        return min(num_found, request.num_tokens - 1)

    def _take_blocks(self, request: Request, hashes: Sequence[BlockHash]) -> Reservation | None:
        """A place in the batch and blocks for all tokens of the request; None, taking nothing, if it must wait."""
        num_others = self._queues.num_in_batch
        if num_others >= self._config.max_rows:
            return None
        num_blocks = self._config.num_blocks_for(request.num_tokens)
        return take_blocks(self._pool, hashes, num_blocks, headroom=num_others)

    def _start(self, request: Request, step: BatchBuilder) -> bool:
        """Give a queued request all the blocks that its tokens need; False, changing nothing, if it must wait."""
        # Cached blocks cannot tell a prompt's logprobs: those are computed from every position's logits.
        blocks = self._take_blocks(request, () if request.wants_prompt_logprobs else request.block_hashes)
        if blocks is None:
            return False
        request.block_table = blocks.block_ids
        running = (entry.request for entry in self._queues.running)
        reused = reuse_cached_tokens(self._pool, request, blocks.num_present, self._config, step, running)
        if not request.was_scheduled:
            request.num_cached_tokens = reused.num_tokens
            self._stats.num_prefix_queries += request.num_context_tokens
            self._stats.num_prefix_hits += reused.num_tokens
            self._stats.num_partial_hit_tokens += reused.num_copied
        request.num_computed_tokens = reused.num_tokens
        request.num_published_blocks = 0
        request.prompt_logprobs = [None] if request.wants_prompt_logprobs else []
        self._queues.move(request, RequestStatus.RUNNING)
        return True
