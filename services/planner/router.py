"""A simulated router: production's admission, headroom and choice of workers, over tables that frames keep up to date.

What a worker has is known as its last frame said, plus what was sent since (`WorkerSession`); what prefill workers have
to do is what this router has sent them (`Workers`). The prefix index is always up to date here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

from kvstore.block import BlockHash
from services.budgets import UNBOUND, Budgets, Objectives, Role
from services.planner.fleet import Setup, Shape
from services.planner.job import Job
from services.planner.redirects import Redirects, Sent
from services.planner.virtual_time import VirtualTime
from services.planner.worker import Load, Worker
from services.planner.workload import FINGERPRINT
from services.rates import Rates
from services.router.admission import Admission, Applicant, Room
from services.router.errors import ApiError
from services.router.fleet import AnswerLengths, Headroom
from services.router.routing import (
    FIXED,
    NO_OBJECTIVES,
    Bending,
    CostModel,
    DecodeCandidate,
    DecodeTable,
    Held,
    KnownPrefix,
    PrefillCandidate,
    PrefillTable,
    RecentPrefixes,
    Refusal,
    RoutedRequest,
    choose,
)

_MODEL = "planned"
_CLIENT = "everybody"
_KEY_BYTES = 16


class SessionView:
    """What the router knows of a decode worker, by the rules of its `WorkerSession`."""

    def __init__(self, block_size: int, load: Load) -> None:
        self.load = load
        self.role: Role = "decode"
        self.budgets = UNBOUND
        self.num_live = 0
        self._num_sent_since_load = 0
        self._num_tokens_since_load = 0
        self._block_size = block_size

    @property
    def num_outstanding(self) -> int:
        """Requests in front of a new one."""
        return max(self.num_live, self.load.num_running + self.load.num_waiting + self._num_sent_since_load)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that a new request could have."""
        return max(self.load.num_free_blocks - -(-self._num_tokens_since_load // self._block_size), 0)

    def sent(self, num_tokens: int) -> None:
        """An order is on its way, with a prompt of so many tokens."""
        self.num_live += 1
        self._num_sent_since_load += 1
        self._num_tokens_since_load += num_tokens

    def ended(self) -> None:
        """One of the requests there has ended."""
        self.num_live -= 1
        self._num_sent_since_load = max(self._num_sent_since_load - 1, 0)

    def told(self, load: Load) -> None:
        """A frame has come."""
        self.load = load
        self._num_sent_since_load = self._num_tokens_since_load = 0


class VirtualRouter:
    """One router over all workers: prefill workers first, then decode workers, as `Shape` counts them."""

    def __init__(
        self,
        shape: Shape,
        setup: Setup,
        time: VirtualTime,
        workers: Sequence[Worker],
        send: Callable[[Job], None],
        redirect: Callable[[Job, int], None],
    ) -> None:
        """`send` is given each job when it has its workers; `redirect` is told which row goes on with its prompt."""
        self._shape, self._setup, self._time, self._workers, self._send = shape, setup, time, workers, send
        # Rows of prefill workers come before those of decode workers; elastic ones are both.
        self._first_decode = 0 if shape.is_elastic else shape.num_prefill
        self._num_prefilling = shape.num_workers if shape.is_elastic else shape.num_prefill
        limits = setup.limits
        self.sessions = [SessionView(limits.block_size, worker.load()) for worker in workers]
        self.queued_tokens = [0] * len(workers)
        """Of prompts that each is expected to compute."""
        self._answers = AnswerLengths()
        self._num_waiting_tokens = 0
        self._names = [f"{'p' if row < shape.num_prefill else 'd'}{row}" for row in range(len(workers))]
        self._rows = {name: row for row, name in enumerate(self._names)}
        self._recent = RecentPrefixes()
        self._cost = CostModel(setup.rates)
        self._decode = DecodeTable([self._decode_candidate(row) for row in range(self._first_decode, len(workers))])
        self._prefill = PrefillTable([self._prefill_candidate(row) for row in range(self._num_prefilling)])
        self._news_of: set[int] = set()
        self._redirect = redirect
        self._redirects = Redirects(_MODEL, self._names, self._objectives_left)
        self._holders = _Holders(workers, limits.num_blocks)
        self.admission = Admission(
            setup.max_concurrent_requests,
            setup.max_queue,
            time.clock,
            fleet=Headroom(self, setup.worker_backlog_s, bends=shape.is_elastic),
        )

    # ---- what headroom asks -------------------------------------------------------

    def decode_table(self) -> DecodeTable:
        for row in self._news_of:
            if row >= self._first_decode:
                self._decode.put(row - self._first_decode, self._decode_candidate(row))
            if row < self._num_prefilling:
                self._prefill.put(row, self._prefill_candidate(row))
        self._news_of.clear()
        return self._decode

    def prefill_table(self) -> PrefillTable:
        self.decode_table()
        return self._prefill

    def rates(self, model_fingerprint: str) -> Rates:
        return self._setup.rates

    def fingerprint(self, model: str) -> str:
        return FINGERPRINT

    def num_waiting_tokens(self) -> float:
        """Of prompts that wait here for room."""
        return self._num_waiting_tokens

    # ---- the way of a request -------------------------------------------------------

    def arrive(self, job: Job) -> bool:
        """Let it wait for room, and then for its workers; False where it was refused."""
        ttft_s = self._setup.objectives.ttft_s
        applicant = Applicant(_MODEL, _CLIENT, num_prompt_tokens=job.request.num_prompt_tokens, ttft_s=ttft_s)
        admitted = self.admission.admit(1, applicant)
        try:
            room = admitted.__enter__()
        except ApiError:
            return False
        self._num_waiting_tokens += job.request.num_prompt_tokens
        if room.num_free:
            self._begin(job, room, admitted)
        else:
            room.on_grant = partial(self._begin, job, room, admitted)
        return True

    def _begin(self, job: Job, room: Room, admitted: AbstractContextManager[Room]) -> None:
        self._num_waiting_tokens -= job.request.num_prompt_tokens
        self._place(job)
        room.begin()

        def ended() -> None:
            room.end()
            admitted.__exit__(None, None, None)

        job.ended = ended
        self._send(job)

    def _place(self, job: Job) -> None:
        request, now_s = job.request, self._time.now_s
        block_size = self._setup.limits.block_size
        held = {self._names[row]: Held(count, (count, 0, 0, 0)) for row, count in self._holders.of(job.hashes)}
        expected = {key[0]: count for key, count in self._recent.num_held(job.hashes, now_s).items()}
        routed = RoutedRequest(
            model=_MODEL,
            num_prompt_tokens=request.num_prompt_tokens,
            key=job.hashes[0] if job.hashes else job.number.to_bytes(_KEY_BYTES, "little"),
            prefixes={FINGERPRINT: KnownPrefix(block_size, len(job.hashes), held, expected)},
            num_final_tokens=request.num_prompt_tokens + request.num_output_tokens,
            objectives=self._objectives_left(request.at_s),
            num_output_tokens=self._answers.expected(_MODEL, request.num_output_tokens),
        )
        decision = choose(routed, self.decode_table(), self._prefill, cost=self._cost)
        assert not isinstance(decision, Refusal), f"no worker for request {job.number}: {decision}"
        job.decode_row = self._rows[decision.decode.worker_id]
        by = self._rows[decision.prefilled_by.worker_id]
        job.prefill_row = -1 if decision.prefills_locally else by
        job.sources = [self._rows[name] for name in decision.sources]
        job.counted_row, job.num_counted_tokens = by, decision.prefilled_by.num_computed_tokens
        self.sessions[job.decode_row].sent(request.num_prompt_tokens)
        self._news_of.add(job.decode_row)
        self._count(by, job.num_counted_tokens)
        self._recent.add((self._names[by], ""), job.hashes, now_s)
        self._holders.given(job.hashes, (by, job.decode_row))
        if self._shape.is_elastic:
            self._redirects.follow(Sent(job, by, job.num_counted_tokens, now_s, decision.deflected == "prompt"))

    def _look(self) -> None:
        """There is news of the fleet: a prompt may be sooner elsewhere."""
        now_s = self._time.now_s
        if not self._redirects.is_due(now_s):
            return
        found = self._redirects.find(now_s, self.decode_table(), self._prefill, self._cost)
        if found is None:
            return
        sent, redirect = found
        job, row = sent.job, self._rows[redirect.to_worker_id]
        self._count(job.counted_row, -job.num_counted_tokens)
        self._recent.forget((self._names[job.counted_row], ""), job.hashes)
        job.counted_row, job.num_counted_tokens = row, redirect.num_left_tokens
        self._count(row, job.num_counted_tokens)
        self._recent.add((self._names[row], ""), job.hashes, now_s)
        self._holders.given(job.hashes, (row,))
        is_deflected = row == job.decode_row
        self._redirects.follow(Sent(job, row, job.num_counted_tokens, now_s, is_deflected, sent.num_redirects + 1))
        self._redirect(job, row)

    def _objectives_left(self, at_s: float) -> Objectives:
        """Of a request that came then. Fixed workers are given none: nothing of theirs would bend."""
        if not self._shape.is_elastic:
            return NO_OBJECTIVES
        objectives = self._setup.objectives
        return Objectives(max(objectives.ttft_s - (self._time.now_s - at_s), 0.0), objectives.tpot_s)

    def bent(self, row: int, role: Role, budgets: Budgets) -> None:
        """A worker says that it has these now."""
        self.sessions[row].role, self.sessions[row].budgets = role, budgets
        self._news_of.add(row)

    def first_token(self, job: Job) -> None:
        """Note that its prompt stands in front of nobody any more."""
        self._redirects.forget(job)
        self._count(job.counted_row, -job.num_counted_tokens)
        job.num_counted_tokens = 0
        if job.prefill_row >= 0:
            self._recent.add((self._names[job.decode_row], ""), job.hashes, self._time.now_s)
        self.admission.fill()

    def ended(self, job: Job) -> None:
        """Note that it has all its tokens."""
        self.sessions[job.decode_row].ended()
        self._answers.observe(_MODEL, job.request.num_output_tokens)
        self._news_of.add(job.decode_row)
        job.ended()

    def frame(self, row: int, load: Load) -> None:
        """Take over what a decode worker says of itself."""
        self.sessions[row].told(load)
        self._news_of.add(row)
        self.admission.fill()
        self._look()

    def _count(self, row: int, num_tokens: int) -> None:
        self.queued_tokens[row] += num_tokens
        self._news_of.add(row)

    def _decode_candidate(self, row: int) -> DecodeCandidate:
        session, limits = self.sessions[row], self._setup.limits
        return DecodeCandidate(
            worker_id=self._names[row],
            incarnation="",
            model_names=(_MODEL,),
            model_fingerprint=FINGERPRINT,
            connected=True,
            draining=False,
            num_outstanding=session.num_outstanding,
            num_waiting_tokens=max(session.load.num_waiting_tokens, self.queued_tokens[row]),
            max_num_seqs=limits.max_num_seqs,
            num_blocks=session.load.num_blocks,
            num_free_blocks=session.num_free_blocks,
            colocated=not self._num_prefilling,
            local_prefill_max_tokens=limits.local_prefill_max_tokens,
            max_model_len=limits.max_model_len,
            bending=self._bending(session),
        )

    def _bending(self, session: SessionView) -> Bending:
        if not self._shape.is_elastic:
            return FIXED
        budgets, load = session.budgets, session.load
        return Bending(
            session.role,
            budgets.tpot_s,
            budgets.prompt_tokens,
            load.num_running,
            load.num_context_tokens,
            load.num_waiting_tokens,
        )

    def _prefill_candidate(self, row: int) -> PrefillCandidate:
        session = self.sessions[row]
        # A prefill worker has no session: what it has to do is what this router gave it.
        num_waiting = session.load.num_waiting_tokens if self._shape.is_elastic else 0
        return PrefillCandidate(
            worker_id=self._names[row],
            incarnation="",
            grpc_address="",
            kv_address="",
            model_names=(_MODEL,),
            model_fingerprint=FINGERPRINT,
            draining=False,
            num_outstanding_tokens=max(num_waiting, self.queued_tokens[row]),
            max_model_len=self._setup.limits.max_model_len,
            bending=self._bending(session),
        )


class _Holders:
    """The prefix index: who has the first blocks of a prompt. Asks those workers that were given such a prompt."""

    def __init__(self, workers: Sequence[Worker], num_blocks: int) -> None:
        self._workers = workers
        self._max_prompts = max(len(workers) * num_blocks, 1)  # of which all workers can have a first block
        self._rows: OrderedDict[BlockHash, set[int]] = OrderedDict()  # by a prompt's first block

    def of(self, hashes: Sequence[BlockHash]) -> list[tuple[int, int]]:
        """Rows, with how many of the blocks each has."""
        rows = self._rows.get(hashes[0]) if hashes else None
        if not rows:
            return []
        return [(row, count) for row in sorted(rows) if (count := self._workers[row].peek(hashes))]

    def given(self, hashes: Sequence[BlockHash], rows: Sequence[int]) -> None:
        """These workers will have the blocks for a while."""
        if not hashes:
            return
        self._rows.setdefault(hashes[0], set()).update(rows)
        self._rows.move_to_end(hashes[0])
        if len(self._rows) > self._max_prompts:
            self._rows.popitem(last=False)
