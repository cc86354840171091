"""The scheduler against a dumb model of the world: any sequence of commands, aborts, transfers and steps.

After each one every block reference has a holder; every token that a step reads is the right one; in the end each
request that was not aborted has the output that it has alone, and all blocks are free.
"""

from __future__ import annotations

import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from kvstore.pool import BlockPool
from kvstore.protocol import Reservation
from services.budgets import MAX_PASSED_OVER, MIN_CHUNK, UNLIMITED, Budgets
from services.engine.api import FinishReason, InvalidRequest, QueueFull, SampledToken, SamplingParams
from services.engine.native.scheduling import Request, shape_of
from services.engine.native.scheduling.batch import Batch
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.request import RequestStatus
from services.engine.native.scheduling.scheduler import Scheduler
from services.rates import RateLearner, Rates
from tests.engine.paged_world import EOS, Oracle, PagedWorld, expected_outputs, next_token

BLOCK_SIZE = 4
MAX_MODEL_LEN = 40
RATES = Rates(1.0, 0.1, 0.0, 0.2, 0.0, num_steps=1.0)


class SchedulerMachine(RuleBasedStateMachine):
    """Commands in any order. Prompts start alike, so that they share blocks."""

    requests = Bundle("requests")

    @initialize(
        num_blocks=st.integers(6, 16),
        max_num_seqs=st.integers(1, 8),
        max_num_batched_tokens=st.one_of(st.integers(1, 24), st.integers(50, 90)),
        prefix_caching=st.booleans(),
        guesses=st.one_of(st.none(), st.integers(0, 99)),
    )
    def start(
        self,
        num_blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool,
        guesses: int | None,
    ) -> None:
        self.config = SchedulerConfig(
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            model_fingerprint="ab",
            eos_token_ids=frozenset({EOS}),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_waiting=8,
            max_prompt_logprob_rows=5,
        )
        self.pool = BlockPool(num_blocks, prefix_caching)
        learner = RateLearner()
        learner.rates = RATES
        self.scheduler = Scheduler(self.config, self.pool, None if guesses is None else Oracle(guesses), learner)
        self.num_without_prompts = 0  # steps beside streams, in a row
        self.saved_s = 0.0  # that steps beside streams have left of their budgets, at most
        self.world = PagedWorld(self.pool, self.config)
        self.accepted: list[Request] = []
        self.granted: dict[str, tuple[Request, Reservation]] = {}  # transfers in progress
        self.lent: list[list[int]] = []  # what this caller must give back
        self.prompt_logprobs: dict[str, int] = {}
        self.num_requests = 0

    def new_request(self, length: int, differs_at: int, **options: object) -> Request:
        prompt = [1 + position % 3 for position in range(length)]
        if differs_at < length:
            prompt[differs_at] = 5
        sampling = {
            name: options.pop(name) for name in ("max_tokens", "ignore_eos", "prompt_logprobs") if name in options
        }
        self.num_requests += 1
        return Request(f"r{self.num_requests}", prompt, SamplingParams(**sampling), **options)  # type: ignore[arg-type]

    @rule(
        target=requests,
        length=st.one_of(st.integers(1, 12), st.integers(1, MAX_MODEL_LEN - 1)),
        differs_at=st.integers(0, 60),
        max_tokens=st.one_of(st.integers(1, 4), st.integers(12, 30)),
        ignore_eos=st.sampled_from([True, True, False]),
        priority=st.integers(0, 2),
        hold_blocks=st.sampled_from([False, False, True]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        cache_salt=st.sampled_from(["", "", "tenant"]),
        tpot_s=st.sampled_from([math.inf, math.inf, math.inf, 5.0, 0.0]),
        reserves=st.booleans(),
    )
    def submit(self, length: int, differs_at: int, reserves: bool, hold_blocks: bool, **options: object) -> Request:
        request = self.new_request(length, differs_at, hold_blocks=hold_blocks and not reserves, **options)
        try:
            (self.scheduler.reserve if reserves else self.scheduler.add)(request)
        except (InvalidRequest, QueueFull):
            assert request.status is RequestStatus.NEW
        else:
            self.accepted.append(request)
        self.grant()
        return request

    @rule(tpot_s=st.sampled_from([math.inf, 0.0, 4.0, 6.0]), prompt_tokens=st.sampled_from([UNLIMITED, 0, 36, 50]))
    def set_budgets(self, tpot_s: float, prompt_tokens: int) -> None:
        self.scheduler.prompt_budget.budgets = Budgets(tpot_s, prompt_tokens)

    def keeps_to_budgets(self, batch: Batch) -> None:
        """Beside streams as much of prompts as they bear, or the smallest chunk where there was none for long."""
        budgets, streams = self.scheduler.prompt_budget.budgets, [each for each in batch.sequences if each.generates]
        prompts = [each for each in batch.sequences if each.num_known > 1]
        if streams and prompts:
            # A prompt that needs no more than its last token is computed as a stream's.
            shape = shape_of([*streams, *prompts])
            tpot_s = min(budgets.tpot_s, *(each.request.tpot_s for each in streams))
            over_s = RATES.step_s(shape) - tpot_s
            keeps = shape.num_prompt_tokens <= budgets.prompt_tokens and over_s <= self.saved_s + 1e-9
            is_due = shape.num_prompt_tokens <= MIN_CHUNK and self.num_without_prompts >= MAX_PASSED_OVER
            assert keeps or is_due, f"{shape} beside {len(streams)} streams, {budgets}, {tpot_s}, {self.saved_s}"
            assert over_s <= 1e-9 or shape.num_prompt_tokens <= MIN_CHUNK, "saved for the smallest chunk"
            self.saved_s = max(self.saved_s - max(over_s, 0.0), 0.0)
        elif streams:
            tpot_s = min(budgets.tpot_s, *(each.request.tpot_s for each in streams))
            self.saved_s += min(max(tpot_s - RATES.step_s(shape_of(streams)), 0.0), 100.0)
        self.num_without_prompts = 0 if prompts else self.num_without_prompts + 1

    @rule(request=requests)
    def abort(self, request: Request) -> None:
        was_live = request.status not in (RequestStatus.NEW, RequestStatus.FINISHED)
        assert self.scheduler.abort(request.request_id) == was_live
        assert not was_live or request.finish_reason is FinishReason.ABORT
        self.grant()

    @rule(target=requests, request=requests, reserves=st.booleans())
    def suspend(self, request: Request, reserves: bool) -> Request:
        """Move a request to another engine, which is this one: with its blocks by a transfer, or without."""
        decodes = request.status is RequestStatus.RUNNING and request.num_tokens - request.num_computed_tokens == 1
        goes = decodes and len(request.output_token_ids) > 0
        goes = goes or request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        assert (self.scheduler.suspend(request.request_id) is request) == goes
        if not goes:
            return request
        assert request.finish_reason is FinishReason.MOVED
        if request.block_table:
            computed = self.world.read(request.block_table, request.num_computed_tokens)
            assert computed == request.token_ids[:-1]
            self.lent.append(list(request.block_table))
        # A transfer brings all but the newest token, which the other engine is given as the first one.
        num_resumed = max(len(request.output_token_ids) - reserves, 0)
        self.num_requests += 1
        follower = Request(
            f"r{self.num_requests}",
            request.prompt_token_ids,
            request.sampling,
            priority=request.priority,
            cache_salt=request.cache_salt,
            hold_blocks=request.hold_blocks and not reserves,
            tpot_s=request.tpot_s,
            resumed_token_ids=request.output_token_ids[:num_resumed],
        )
        try:
            (self.scheduler.reserve if reserves else self.scheduler.add)(follower)
        except QueueFull:
            pass
        except InvalidRequest:  # whoever holds blocks wants one token of it; to the end it may not fit here
            assert request.hold_blocks
            assert not follower.hold_blocks
        else:
            self.accepted.append(follower)
        self.grant()
        return follower

    @rule(request=requests)
    def cancel_reservation(self, request: Request) -> None:
        was_reserving = request.status is RequestStatus.RESERVING
        assert self.scheduler.cancel_reservation(request) == was_reserving
        if was_reserving:
            self.accepted.remove(request)
        self.grant()

    @rule(data=st.data())
    def end_transfer(self, data: st.DataObject) -> None:
        if not self.granted:
            return
        request, grant = self.granted.pop(data.draw(st.sampled_from(sorted(self.granted))))
        if request.status is RequestStatus.RESERVED and data.draw(st.booleans()):
            self.world.transfer(request, grant.block_ids, grant.num_present)
            first_token = SampledToken(next_token(request.token_ids))
            update = self.scheduler.add_prefilled(request, grant.block_ids, grant.block_ids, first_token)
            assert update.new_tokens == (first_token,)
            assert (update.finish_reason is not None) == request.is_finished
        else:
            for block_id in grant.block_ids[grant.num_present :]:
                self.world.blocks[block_id] = [-1] * BLOCK_SIZE  # half a transfer
            was_reserved = request.status is RequestStatus.RESERVED
            self.scheduler.release_reservation(request, grant.block_ids)
            if was_reserved and data.draw(st.booleans()):
                self.accepted.remove(request)
                try:
                    self.scheduler.add(request)  # prefilled here, after all
                except QueueFull:
                    pass
                else:
                    self.accepted.append(request)
            elif was_reserved:
                self.accepted.remove(request)
        self.grant()

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.lent:
            self.scheduler.release_lent(self.lent.pop(data.draw(st.integers(0, len(self.lent) - 1))))
            self.grant()

    @rule(request=requests, data=st.data())
    def lend(self, request: Request, data: st.DataObject) -> None:
        num_full = request.num_computed_tokens // BLOCK_SIZE
        if request.status is RequestStatus.RUNNING and num_full:
            block_ids = request.block_table[: data.draw(st.integers(1, num_full))]
            self.scheduler.loans.lend(block_ids)
            self.lent.append(block_ids)

    @rule(num_steps=st.integers(1, 10))
    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()

    @rule(data=st.data())
    def step_with_aborts_in_the_middle(self, data: st.DataObject) -> None:
        batch = self.scheduler.schedule()
        if batch is None:
            self.grant()
            return
        self.keeps_to_budgets(batch)
        sampled = self.world.run(batch)
        victims = data.draw(st.lists(st.sampled_from(batch.sequences), unique_by=id, max_size=2))
        for sequence in victims:
            assert self.scheduler.abort(sequence.request.request_id)
            assert self.scheduler.grant_reservations() == []
            self.scheduler.check_integrity()
        aborted = {sequence.request.request_id for sequence in victims}
        updates = self.scheduler.update(batch, sampled)
        assert not aborted & {update.request.request_id for update in updates}
        self.book(batch, updates)

    def step(self) -> bool:
        """One step; whether anything could be computed."""
        had_work = self.scheduler.has_work
        batch = self.scheduler.schedule()
        if batch is not None:
            self.keeps_to_budgets(batch)
            self.book(batch, self.scheduler.update(batch, self.world.run(batch)))
        assert batch is None or had_work, "work that has_work denied"
        self.grant()
        return batch is not None

    def book(self, batch: Batch, updates: list) -> None:  # type: ignore[type-arg]
        for update in updates:
            request = update.request
            if request.hold_blocks and request.is_finished:
                assert len(request.output_token_ids) == 1
                self.lent.append(list(request.block_table))
            if update.prompt_logprobs is not None:
                self.prompt_logprobs[request.request_id] = len(update.prompt_logprobs)
                told = [position.chosen.token_id for position in update.prompt_logprobs[1:]]
                assert update.prompt_logprobs[0] is None
                assert told == list(request.prompt_token_ids[1:])
        self.grant()

    def grant(self) -> None:
        for request, grant in self.scheduler.grant_reservations():
            assert len(grant.block_ids) == self.config.num_blocks_for(request.num_context_tokens)
            self.granted[request.request_id] = request, grant

    @invariant()
    def every_reference_has_a_holder(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            self.no_block_is_a_wrong_guess_s()
            assert self.scheduler.num_running <= self.config.max_num_seqs

    def no_block_is_a_wrong_guess_s(self) -> None:
        for request in self.accepted:
            if request.status is RequestStatus.RUNNING:
                assert len(request.block_table) <= self.config.num_blocks_for(request.num_tokens)
                assert request.num_computed_tokens < request.num_tokens

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # Whoever holds memory gives it back sooner or later; then all must come to its end.
        for _ in range(2000):
            progressed = self.step()
            self.scheduler.check_integrity()
            if self.granted:
                _, (request, grant) = self.granted.popitem()
                if request.status is RequestStatus.RESERVED:
                    self.world.transfer(request, grant.block_ids, grant.num_present)
                    token = SampledToken(next_token(request.token_ids))
                    self.scheduler.add_prefilled(request, grant.block_ids, grant.block_ids, token)
                else:
                    self.scheduler.release_reservation(request, grant.block_ids)
            elif self.lent:
                self.scheduler.release_lent(self.lent.pop())
            elif not progressed and not self.scheduler.has_work and not self.granted:
                break
            self.grant()
        unfinished = [request.request_id for request in self.accepted if not request.is_finished]
        assert not unfinished, f"never ended: {unfinished}"
        for request in self.accepted:
            self.check_output(request)
        self.scheduler.check_integrity()
        assert self.pool.num_free == self.pool.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.scheduler.loans.num_blocks == 0

    def check_output(self, request: Request) -> None:
        expected = expected_outputs(request.prompt_token_ids, request.sampling, MAX_MODEL_LEN)
        if request.hold_blocks:
            expected = expected[:1]
        if request.finish_reason in (FinishReason.ABORT, FinishReason.MOVED):
            assert request.output_token_ids == expected[: len(request.output_token_ids)]
            return
        assert request.output_token_ids == expected
        if request.sampling.prompt_logprobs is not None and request.request_id in self.prompt_logprobs:
            assert self.prompt_logprobs[request.request_id] == request.num_prompt_tokens


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_sequence_of_commands = SchedulerMachine.TestCase
