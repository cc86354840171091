"""A worker that leaps: steps that carry prompts are taken one by one, a stretch of steps with streams alone at once.

A stream's token takes a step, and a step's time grows by the same amount with each, as contexts do: so the time of k
steps is a polynomial in k, and between a join and the next end nothing else happens. Who comes in mid-stretch cuts it
at the end of the step in progress. Against `StepWorker` it leaves out: preemption, blocks that are shared by running
requests, and that a prompt waits for an equal one that is being computed.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from kvstore.block import BlockHash
from services.budgets import Budgets
from services.engine.prompt_budget import PromptBudget
from services.planner.fleet import Limits
from services.planner.job import Job
from services.planner.virtual_time import VirtualTime
from services.planner.worker import Listener, Load
from services.rates import RateLearner, Rates, StepShape, num_pairs


class _Prompt:
    """A prompt that waits or is computed here."""

    def __init__(self, job: Job, hold: bool) -> None:
        self.job, self.hold = job, hold
        self.num_computed = self.num_cached = 0
        self.has_begun = False

    @property
    def num_left(self) -> int:
        return self.job.request.num_prompt_tokens - self.num_computed


class FlowWorker:
    """One of them."""

    def __init__(self, row: int, time: VirtualTime, rates: Rates, limits: Limits, listener: Listener) -> None:
        self.row = row
        self.busy_s = 0.0
        self.num_steps = 0
        self._time, self._rates, self._limits, self._listener = time, rates, limits, listener
        self._commands: deque[Callable[[], None]] = deque()
        self._queue: deque[_Prompt] = deque()
        self._started: list[_Prompt] = []
        self._reserving: deque[tuple[Job, Callable[[], None]]] = deque()
        self._streams: list[tuple[int, int, Job]] = []  # heap: step in which its last token comes, number, job
        self._num_context = 0  # of all streams: tokens that each one's newest attends to
        self._num_reserved = 0
        self._used: dict[int, int] = {}  # blocks of jobs here, by number
        self._num_used = 0
        self._cache: OrderedDict[BlockHash, None] = OrderedDict()  # the least recently used first
        learner = RateLearner()
        learner.rates = rates  # as if it had learnt for long
        self._prompt_budget = PromptBudget(learner)
        self._num_done = 0  # steps so far
        self._began_s = 0.0
        self._stretch = 0  # steps of the one in progress; 0: none is
        self._version = 0
        self._is_in_turn = False

    # ---- what is asked -------------------------------------------------------

    def peek(self, hashes: Sequence[BlockHash]) -> int:
        num_found = 0
        for block_hash in hashes:
            if block_hash not in self._cache:
                break
            num_found += 1
        return num_found

    def compute(self, job: Job, hold: bool = False) -> None:
        self._order(lambda: self._queue.append(_Prompt(job, hold)))

    def give_up(self, job: Job, then: Callable[[], None]) -> None:
        self._order(lambda: self._give_up(job, then))

    def reserve(self, job: Job, granted: Callable[[], None]) -> None:
        self._order(lambda: self._reserving.append((job, granted)))

    def cancel(self, job: Job) -> None:
        self._order(lambda: self._cancel(job))

    def join(self, job: Job) -> None:
        self._order(lambda: self._join(job))

    def release(self, job: Job) -> None:
        self._order(lambda: self._free(job))

    def bring(self, hashes: Sequence[BlockHash], then: Callable[[], None]) -> None:
        self._cache_blocks(hashes)
        then()

    def bend(self, budgets: Budgets) -> None:
        self._prompt_budget.budgets = budgets

    def load(self) -> Load:
        num_prompts = len(self._started)
        return Load(
            num_running=len(self._streams) + num_prompts,
            num_waiting=len(self._queue) + len(self._reserving) + self._num_reserved,
            num_free_blocks=self._num_free,
            num_blocks=self._limits.num_blocks,
            num_waiting_tokens=sum(each.num_left for each in (*self._queue, *self._started)),
            num_context_tokens=self._num_context,
        )

    @property
    def _num_free(self) -> int:
        return max(self._limits.num_blocks - self._num_used, 0)

    # ---- between two steps ----------------------------------------------------

    def _order(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        if self._is_in_turn:
            return
        if self._stretch > 1:
            self._cut()
        elif not self._stretch:
            self._turn()

    def _cut(self) -> None:
        """End the stretch with the step in progress."""
        num = self._steps_within(self._time.now_s - self._began_s)
        if num < self._stretch:
            self._stretch = num
            self._version += 1
            self._time.at(self._began_s + self._stretch_s(num), self._end_stretch, self._version)

    def _turn(self) -> None:
        self._is_in_turn = True
        while True:
            while self._commands:
                self._commands.popleft()()
            self._let_in()
            if self._started:
                self._begin_step()
                break
            if self._streams:
                self._begin_stretch()
                break
            if not self._commands:
                break
        self._is_in_turn = False

    def _let_in(self) -> None:
        """Let prompts and reservations in, in order of coming, as far as places and blocks allow."""
        limits = self._limits
        while self._reserving:
            job, granted = self._reserving[0]
            if not self._has_place(job):
                break
            self._reserving.popleft()
            self._take(job)
            self._num_reserved += 1
            granted()
        budget = limits.max_num_batched_tokens - len(self._streams) - sum(each.num_left for each in self._started)
        while self._queue and budget > 0 and self._has_place(self._queue[0].job):
            prompt = self._queue.popleft()
            self._take(prompt.job)
            num_cached = self.peek(prompt.job.hashes) * limits.block_size
            prompt.num_computed = min(num_cached, prompt.job.request.num_prompt_tokens - 1)
            prompt.num_cached = prompt.num_computed
            prompt.job.num_cached_tokens = max(prompt.num_computed - prompt.job.num_own_tokens, 0)
            self._touch(prompt.job.hashes[: num_cached // limits.block_size])
            self._started.append(prompt)
            budget -= prompt.num_left

    def _give_up(self, job: Job, then: Callable[[], None]) -> None:
        prompt = next((each for each in (*self._queue, *self._started) if each.job is job), None)
        if prompt is None:
            return
        if prompt in self._started:
            self._started.remove(prompt)
            self._cache_blocks(job.hashes[: prompt.num_computed // self._limits.block_size])
            self._free(job)
            job.num_own_tokens += prompt.num_computed - prompt.num_cached
        else:
            self._queue.remove(prompt)
        then()

    def _has_place(self, job: Job) -> bool:
        num_others = len(self._streams) + len(self._started) + self._num_reserved
        num_wanted = -(-job.request.num_prompt_tokens // self._limits.block_size)
        return num_others < self._limits.max_num_seqs and num_wanted + num_others <= self._num_free

    def _take(self, job: Job) -> None:
        num_blocks = -(-job.request.num_prompt_tokens // self._limits.block_size)
        self._used[job.number] = num_blocks
        self._num_used += num_blocks

    def _free(self, job: Job) -> None:
        self._num_used -= self._used.pop(job.number)

    def _cancel(self, job: Job) -> None:
        if job.number in self._used:
            self._num_reserved -= 1
            self._free(job)
        else:
            self._reserving = deque(entry for entry in self._reserving if entry[0] is not job)

    def _join(self, job: Job) -> None:
        self._num_reserved -= 1
        job.num_said, job.last_s = 1, self._time.now_s
        self._cache_blocks(job.hashes)
        self._stream(job)

    def _stream(self, job: Job) -> None:
        """It has its first token; from the next step on it gets one in each."""
        num_to_come = job.request.num_output_tokens - 1
        if num_to_come == 0:
            self._free(job)
            self._listener.ended(job)
            return
        # Blocks for all that it will say: what it will take it has, so that nobody need be preempted.
        num_more = -(-num_to_come // self._limits.block_size)
        self._used[job.number] += num_more
        self._num_used += num_more
        self._num_context += job.request.num_prompt_tokens + 1
        heapq.heappush(self._streams, (self._num_done + num_to_come, job.number, job))

    # ---- a step with prompts ------------------------------------------------------

    def _begin_step(self) -> None:
        budget = self._limits.max_num_batched_tokens - len(self._streams)
        chunks: list[tuple[_Prompt, int]] = []
        num_tokens = num_pairs_ = 0
        self._prompt_budget.begin((math.inf,) if self._streams else ())
        for prompt in self._started:
            num = min(prompt.num_left, budget)
            if self._prompt_budget.is_bounded and prompt.num_left > 1:
                shape = StepShape(num_tokens, num_pairs_, len(self._streams), self._num_context)
                num = min(num, self._prompt_budget.room(shape, prompt.num_computed))
            if num <= 0:
                break
            chunks.append((prompt, num))
            budget -= num
            num_tokens += num
            num_pairs_ += num_pairs(prompt.num_computed, num)
            if not prompt.has_begun:
                prompt.has_begun = True
                if prompt.hold:
                    self._listener.begun(prompt.job)
        self._prompt_budget.end(carries_prompts=bool(chunks))
        seconds = self._rates.step_s(StepShape(num_tokens, num_pairs_, len(self._streams), self._num_context))
        self._stretch = 1
        self._version += 1
        self._time.after(seconds, self._end_step, chunks, seconds)

    def _end_step(self, chunks: Sequence[tuple[_Prompt, int]], seconds: float) -> None:
        self._stretch, self._is_in_turn = 0, True
        self._stream_steps(1, seconds)
        for prompt, num_tokens in chunks:
            prompt.num_computed += num_tokens
            if prompt.num_left == 0:
                job = prompt.job
                self._cache_blocks(job.hashes)
                self._started.remove(prompt)
                self._listener.first(self.row, job, num_tokens)
                if not prompt.hold:
                    job.num_said = 1
                    self._stream(job)
        self._listener.stepped(self.row)
        self._turn()

    # ---- steps with streams alone ---------------------------------------------------

    def _begin_stretch(self) -> None:
        self._began_s = self._time.now_s
        self._stretch = self._streams[0][0] - self._num_done
        self._version += 1
        self._time.after(self._stretch_s(self._stretch), self._end_stretch, self._version)

    def _end_stretch(self, version: int) -> None:
        if version != self._version:
            return
        num, self._stretch, self._is_in_turn = self._stretch, 0, True
        self._stream_steps(num, self._time.now_s - self._began_s)
        self._listener.stepped(self.row)
        self._turn()

    def _stretch_s(self, num_steps: int) -> float:
        """Seconds of so many steps from now on: each is longer than the one before by what a token of context takes."""
        first = self._rates.step_s(StepShape(0, 0, len(self._streams), self._num_context))
        growth = self._rates.context_token_s * len(self._streams)
        return num_steps * first + growth * (num_steps * (num_steps - 1) // 2)

    def _steps_within(self, seconds: float) -> int:
        """Steps that have ended by then, and the one in progress."""
        first = self._rates.step_s(StepShape(0, 0, len(self._streams), self._num_context))
        half = self._rates.context_token_s * len(self._streams) / 2
        linear = first - half
        exact = 2 * seconds / (linear + math.sqrt(linear * linear + 4 * half * seconds))
        return max(1, math.ceil(exact - 1e-9))

    def _stream_steps(self, num_steps: int, seconds: float) -> None:
        """So many steps have ended: each stream has as many tokens more, and some have ended."""
        self.busy_s += seconds
        self.num_steps += num_steps
        self._num_done += num_steps
        if not self._streams:
            return
        self._num_context += num_steps * len(self._streams)
        self._listener.gaps(seconds / num_steps, num_steps * len(self._streams))
        while self._streams and self._streams[0][0] <= self._num_done:
            _, _, job = heapq.heappop(self._streams)
            self._num_context -= job.request.num_prompt_tokens + job.request.num_output_tokens
            self._free(job)
            self._listener.ended(job)

    # ---- the prefix cache -------------------------------------------------------------

    def _cache_blocks(self, hashes: Sequence[BlockHash]) -> None:
        for block_hash in hashes:
            self._cache[block_hash] = None
        self._touch(hashes)
        while len(self._cache) > self._limits.num_blocks:
            self._cache.popitem(last=False)

    def _touch(self, hashes: Sequence[BlockHash]) -> None:
        # The last block is the oldest: a chain is forgotten from its end.
        for block_hash in reversed(hashes):
            self._cache.move_to_end(block_hash)
