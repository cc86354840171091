"""Sends requests through a fleet in virtual time: production's router and schedulers, steps as long as rates say.

    arrival ─▶ router: admission, choice ─▶ decode worker ─▶ prefill worker ─▶ chunks ─▶ handoff ─▶ steps ─▶ end
                                                  └─▶ or the prompt is computed where it decodes ──────┘

What takes time: waiting in the router and in workers' queues, steps, the ways between processes (`Delays`), the fetch
of a prefix, and the handoff: reading the last chunk's blocks, since the others travel while it is computed, or all of
them where they had to wait for room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from services.budgets import Budgets, Role, budgets_of
from services.planner.controller import BEAT_S, Controller
from services.planner.fleet import Setup, Shape
from services.planner.flow_worker import FlowWorker
from services.planner.job import Job, Outcome
from services.planner.outcomes import Gaps, Outcomes
from services.planner.router import VirtualRouter
from services.planner.step_worker import StepWorker
from services.planner.virtual_time import VirtualTime
from services.planner.worker import Worker
from services.planner.workload import Workload, hashes_of
from services.rates import Rates, tokens_of

MAX_STEP_WORKERS = 16
"""A larger fleet's workers leap over steps in which nobody comes or goes (`FlowWorker`)."""


_NUM_STEPS: Final = 100.0
_SPREAD: Final = 0.05  # the least that machines that are busy with nothing else show


def simulate(
    workload: Workload,
    shape: Shape,
    setup: Setup,
    *,
    takes_steps: bool | None = None,
) -> Outcomes:
    """What becomes of the requests. The same arguments give the same result, to the last bit.

    `takes_steps`: whether workers take each step; None: up to MAX_STEP_WORKERS of them do.
    """
    if takes_steps is None:
        takes_steps = shape.num_workers <= MAX_STEP_WORKERS
    return Simulation(workload, shape, setup, takes_steps).run()


class Simulation:
    """One run."""

    def __init__(
        self,
        workload: Workload,
        shape: Shape,
        setup: Setup,
        takes_steps: bool,
    ) -> None:
        setup = replace(setup, rates=_learnt(setup.rates))
        self._workload, self._shape, self._setup = workload, shape, setup
        self.time = VirtualTime()
        kind = StepWorker if takes_steps else FlowWorker
        self.workers: list[Worker] = [
            kind(row, self.time, setup.rates, setup.limits, self) for row in range(shape.num_workers)
        ]
        self._router = VirtualRouter(shape, setup, self.time, self.workers, self._routed, self._redirect)
        self._controller: Controller | None = None
        if shape.is_elastic:
            self._make_elastic()
        self._needs_tokens = takes_steps
        self._outcomes: list[Outcome] = []
        self._gaps = Gaps()
        self._handoffs: dict[int, _Handoff] = {}
        self._next = 0
        self._num_redirects = 0

    def _make_elastic(self) -> None:
        """Give each its role, and somebody who changes it."""
        router = self._router
        self._controller = Controller(
            self._setup, router.sessions, router.queued_tokens, self._bend, router.num_waiting_tokens, self.time.clock
        )
        for worker in self.workers:
            role: Role = "prefill" if worker.row < self._shape.num_prefill else "decode"
            self._bend(worker.row, role, budgets_of(role, self._setup.objectives), at_once=True)

    def _bend(self, row: int, role: Role, budgets: Budgets, *, at_once: bool = False) -> None:
        delays = self._setup.delays
        if at_once:
            self.workers[row].bend(budgets)
            self._router.bent(row, role, budgets)
        else:
            self.time.after(delays.order_s, self.workers[row].bend, budgets)
            self.time.after(delays.order_s + delays.frame_s, self._router.bent, row, role, budgets)

    def _beat(self) -> None:
        if self._controller is not None and len(self._outcomes) < len(self._workload.requests):
            self._controller.beat(self.time.now_s)
            self.time.after(BEAT_S, self._beat)

    def run(self) -> Outcomes:
        """Run it to its end."""
        self._next_arrival()
        self._beat()
        self.time.run()
        num_prefill = self._shape.num_only_prefill
        busy_s = [worker.busy_s for worker in self.workers]
        return Outcomes(
            shape=self._shape,
            objectives=self._setup.objectives,
            outcomes=self._outcomes,
            gaps=self._gaps,
            span_s=self._workload.span_s,
            duration_s=self.time.now_s,
            prefill_busy_s=sum(busy_s[:num_prefill]),
            decode_busy_s=sum(busy_s[num_prefill:]),
            num_steps=sum(worker.num_steps for worker in self.workers),
            num_flips=self._controller.num_flips if self._controller is not None else 0,
            num_redirects=self._num_redirects,
        )

    # ---- arrivals -----------------------------------------------------------------

    def _next_arrival(self) -> None:
        if self._next < len(self._workload.requests):
            self.time.at(self._workload.requests[self._next].at_s, self._arrive, self._next)
            self._next += 1

    def _arrive(self, number: int) -> None:
        self._next_arrival()
        request = self._workload.requests[number]
        token_ids = self._workload.prompt(request)
        job = Job(number, request, hashes=hashes_of(token_ids, self._setup.limits.block_size))
        if self._needs_tokens:
            job.token_ids = token_ids
        if self._controller is not None:
            self._controller.arrived(request.num_prompt_tokens)
        if not self._router.arrive(job):
            self._record(job)

    # ---- from the router to the first token ------------------------------------------

    def _routed(self, job: Job) -> None:
        self.time.after(self._setup.delays.order_s, self._at_decode, job)

    def _at_decode(self, job: Job) -> None:
        worker, limits = self.workers[job.decode_row], self._setup.limits
        if job.course:  # a redirection has overtaken it
            return
        num_uncached = max(1, job.request.num_prompt_tokens - worker.peek(job.hashes) * limits.block_size)
        if job.prefill_row < 0 or (self._shape.num_prefill and num_uncached <= limits.local_prefill_max_tokens):
            self._with_prefix(worker, job, partial(self._compute, worker, job, False, job.course))
        else:
            self.time.after(self._setup.delays.order_s, self._at_prefill, job, job.course)

    def _at_prefill(self, job: Job, course: int) -> None:
        if course == job.course:
            worker = self.workers[job.prefill_row]
            self._with_prefix(worker, job, partial(self._compute, worker, job, True, course))

    def _compute(self, worker: Worker, job: Job, hold: bool, course: int) -> None:
        if course == job.course:
            if hold:
                self._handoffs[job.number] = _Handoff()
            job.at_row = worker.row
            worker.compute(job, hold)

    # ---- redirections ---------------------------------------------------------------

    def _redirect(self, job: Job, row: int) -> None:
        self.time.after(self._setup.delays.order_s, self._redirected, job, row)

    def _redirected(self, job: Job, row: int) -> None:
        """Its decode worker has heard that this one goes on; nothing, where its prompt is computed by now."""
        if job.at_row < 0:
            self._go_on(job, row)
        elif job.at_row != row and job.first_s < 0:
            self.workers[job.at_row].give_up(job, partial(self._go_on, job, row))

    def _go_on(self, job: Job, row: int) -> None:
        handoff = self._handoffs.pop(job.number, None)
        if handoff is not None and handoff.has_asked:
            self.workers[job.decode_row].cancel(job)
        if job.at_row >= 0:
            job.sources = (job.at_row, *job.sources)
        self._num_redirects += 1
        job.course, job.at_row = job.course + 1, -1
        worker = self.workers[row]
        if row == job.decode_row:
            job.prefill_row = -1
            self._with_prefix(worker, job, partial(self._compute, worker, job, False, job.course))
        else:
            job.prefill_row = row
            self.time.after(self._setup.delays.order_s, self._at_prefill, job, job.course)

    def _with_prefix(self, worker: Worker, job: Job, then: Callable[[], None]) -> None:
        """Fetch what of its prefix another worker has, if that is sooner than computing it."""
        block_size = self._setup.limits.block_size
        num_own = worker.peek(job.hashes)
        counts = [self.workers[row].peek(job.hashes) for row in job.sources if row != worker.row]
        best = max(counts, default=0)
        missing = tokens_of("device", max(best - num_own, 0) * block_size)
        if best > num_own and self._setup.rates.fetching_pays(missing, num_own * block_size):
            self.time.after(self._setup.rates.fetch_s(missing), worker.bring, job.hashes[:best], then)
        else:
            then()

    def begun(self, job: Job) -> None:
        """Its blocks are offered, so the decode worker looks for room for them."""
        self.time.after(self._setup.delays.order_s, self._reserve, job, self._handoffs[job.number])

    def _reserve(self, job: Job, handoff: _Handoff) -> None:
        if handoff is self._handoffs.get(job.number):  # else its only token has come already, or it was redirected
            handoff.has_asked = True
            self.workers[job.decode_row].reserve(job, partial(self._granted, job, handoff))

    def _granted(self, job: Job, handoff: _Handoff) -> None:
        if handoff is not self._handoffs.get(job.number):  # the same, and the room is being given back
            return
        handoff.granted_s = self.time.now_s
        self._read_rest(job, handoff)

    def first(self, row: int, job: Job, num_last_tokens: int) -> None:
        if row != job.prefill_row:
            self._say_first(job)
            return
        if job.request.num_output_tokens == 1:  # nothing is handed over
            if self._handoffs.pop(job.number).has_asked:
                self.workers[job.decode_row].cancel(job)
            self.workers[row].release(job)
            self._say_first(job)
            self.ended(job)
            return
        handoff = self._handoffs[job.number]
        handoff.computed_s, handoff.num_last_tokens = self.time.now_s, num_last_tokens
        self._read_rest(job, handoff)

    def _read_rest(self, job: Job, handoff: _Handoff) -> None:
        """Read what is left of its blocks, once there is room for them and all are computed."""
        if handoff.granted_s < 0 or handoff.computed_s < 0:
            return
        was_in_time = handoff.granted_s < handoff.computed_s
        num_tokens = handoff.num_last_tokens if was_in_time else job.request.num_prompt_tokens
        read_s = self._setup.rates.fetch_s(tokens_of("device", num_tokens))
        self.time.after(read_s + self._setup.delays.handoff_s, self._handed_over, job)

    def _handed_over(self, job: Job) -> None:
        del self._handoffs[job.number]
        self._say_first(job)
        self.workers[job.prefill_row].release(job)
        self.workers[job.decode_row].join(job)

    def _say_first(self, job: Job) -> None:
        job.first_s = self.time.now_s + self._setup.delays.frame_s
        self.time.at(job.first_s, self._router.first_token, job)

    # ---- from there to the end ----------------------------------------------------------

    def ended(self, job: Job) -> None:
        job.end_s = self.time.now_s + self._setup.delays.frame_s
        self.time.at(job.end_s, self._router.ended, job)
        if self._controller is not None:
            self.time.at(job.end_s, self._controller.ended, job)
        self._record(job)

    def gaps(self, seconds: float, num_tokens: int) -> None:
        self._gaps.add(seconds, num_tokens)

    def stepped(self, row: int) -> None:
        """A frame goes out, behind the outputs of the step; prefill workers send none."""
        if self._shape.is_elastic or row >= self._shape.num_prefill:
            self.time.after(self._setup.delays.frame_s, self._router.frame, row, self.workers[row].load())

    def _record(self, job: Job) -> None:
        request = job.request
        self._outcomes.append(
            Outcome(
                request.at_s,
                job.first_s,
                job.end_s,
                request.num_prompt_tokens,
                job.num_cached_tokens,
                request.num_output_tokens,
            )
        )


def _learnt(rates: Rates) -> Rates:
    """A profile's rates as those of a worker that has taken steps: budgets and policy rely on no guess."""
    return rates if rates.num_steps else replace(rates, num_steps=_NUM_STEPS, spread=_SPREAD)


class _Handoff:
    """Where a prompt stands between two workers. Negative times: not yet."""

    def __init__(self) -> None:
        self.granted_s = -1.0
        self.computed_s = -1.0
        self.num_last_tokens = 0
        self.has_asked = False
        """For room at the decode worker."""
