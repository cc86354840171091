"""What steps carry of prompts beside streams: as much as the budgets allow, and MIN_CHUNK now and then."""

from __future__ import annotations

import math
import random

import pytest

from kvstore.pool import BlockPool
from services.budgets import MAX_PASSED_OVER, MIN_CHUNK, UNBOUND, Budgets
from services.engine.native.scheduling import Request
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.scheduler import Scheduler
from services.engine.prompt_budget import PromptBudget
from services.rates import GUESSED, NO_STEP, RateLearner, Rates, StepShape
from tests.engine.paged_world import Oracle, PagedWorld, expected_outputs
from tests.engine.test_scheduler import BLOCK_SIZE, Bench, make_request

RATES = Rates(
    base_s=1.0, prompt_token_s=0.01, prompt_pair_s=1e-5, running_s=0.1, context_token_s=0.0, spread=0.1, num_steps=9.0
)
NOTHING = Budgets(tpot_s=0.0)


def learnt(rates: Rates = RATES) -> RateLearner:
    learner = RateLearner()
    learner.rates = rates
    return learner


class BudgetBench(Bench):
    """Room for prompts of hundreds of tokens, and rates that stay."""

    def __init__(self, rates: Rates = RATES, guesses: int | None = None, **limits: int) -> None:
        super().__init__(**{"max_model_len": 600, "max_num_batched_tokens": 300, "num_blocks": 500, **limits})
        oracle = None if guesses is None else Oracle(guesses)
        self.scheduler = Scheduler(self.config, self.pool, oracle, learnt(rates))

    def bound(self, tpot_s: float = math.inf, prompt_tokens: int = UNBOUND.prompt_tokens) -> None:
        self.scheduler.prompt_budget.budgets = Budgets(tpot_s, prompt_tokens)

    def stream(self, name: str = "s", **options: object) -> Request:
        """One that generates, for as long as a test takes."""
        request = self.add(name, 3, **{"max_tokens": 500, **options})
        self.step()
        return request


def test_started_prompts_and_new_ones_share_the_room_beside_streams() -> None:
    bench = BudgetBench()
    bench.bound(prompt_tokens=100)
    bench.stream()
    for name in "abc":
        bench.add(name, 60)
    assert bench.shapes(3) == [
        {"s": 1, "a": 60, "b": 40},
        {"s": 1, "a": 1, "b": 20, "c": 60},
        {"s": 1, **dict.fromkeys("abc", 1)},
    ]


def test_what_is_left_of_the_room_has_to_be_worth_it() -> None:
    bench = BudgetBench()
    bench.bound(prompt_tokens=60 + MIN_CHUNK - 1)
    bench.stream()
    bench.add("a", 60)
    bench.add("b", 60)
    assert bench.shapes(2) == [{"s": 1, "a": 60}, {"s": 1, "a": 1, "b": 60}]


def test_the_time_of_a_step_is_what_its_streams_and_the_prompt_s_place_leave() -> None:
    bench = BudgetBench()
    bench.stream()
    bench.stream("t")
    bench.bound(tpot_s=2.0)  # 1.2 of it the streams'
    bench.add("a", 200)
    shape, _ = bench.step()
    room = shape["a"]
    took = RATES.step_s(StepShape(room, room * (room + 1) // 2, 2))
    assert took <= 2.0 < took + RATES.prompt_token_s + RATES.prompt_pair_s * room
    later, _ = bench.step()
    assert later["a"] < room, "each of its tokens attends to those before it"


@pytest.mark.parametrize(
    ("worker", "streams", "room"), [(2.0, (9.0, 1.7), 50), (1.7, (math.inf, 2.0), 50), (2.0, (), 200)]
)
def test_the_smallest_of_the_streams_bounds_and_the_worker_s_counts(
    worker: float, streams: tuple[float, ...], room: int
) -> None:
    bench = BudgetBench(Rates(**{**vars(RATES), "prompt_pair_s": 0.0, "running_s": 0.1}))
    bench.bound(tpot_s=worker)
    for name, tpot_s in zip("st", streams, strict=False):
        bench.stream(name, tpot_s=tpot_s)
    bench.add("a", 200, tpot_s=0.0)  # its own counts as soon as it is a stream
    assert bench.step()[0]["a"] == pytest.approx(room, abs=1)


def test_nothing_bounds_a_step_without_streams_whatever_it_has_of_prompts() -> None:
    bench = BudgetBench()
    bench.bound(0.0, 0)
    bench.add("a", 300, tpot_s=0.0)
    bench.add("b", 200, tpot_s=0.0)
    assert bench.shapes(1) == [{"a": 300}]
    bench.bound()
    assert bench.shapes(1) == [{"a": 1}], "now a stream that allows nothing beside it"


def test_a_prompt_handed_over_is_no_stream_before_its_first_token() -> None:
    bench = BudgetBench(max_num_batched_tokens=100)
    bench.bound(0.0, 0)
    bench.add("a", 101, tpot_s=0.0)
    bench.add("b", 60)
    assert bench.shapes(2) == [{"a": 100}, {"a": 1, "b": 60}]


def test_what_is_too_little_for_a_chunk_is_saved_for_a_later_step() -> None:
    bench = BudgetBench(Rates(**{**vars(RATES), "prompt_pair_s": 0.0}))
    bench.stream(max_tokens=200)
    alone_s = RATES.step_s(StepShape(num_running=1))
    bench.bound(tpot_s=alone_s + 20 * RATES.prompt_token_s)
    bench.add("a", 400)
    carried = [shape.get("a", 0) for shape in bench.shapes(16)]
    assert set(carried) == {0, MIN_CHUNK}
    assert sum(carried) > 16 * 20 - 2 * MIN_CHUNK
    assert all(sum(carried[:number]) <= 20 * number for number in range(17)), "never in advance"


def test_prompts_left_out_eight_times_get_the_smallest_chunk_one_at_a_time() -> None:
    bench = BudgetBench()
    bench.stream()
    bench.bound(0.0)
    bench.add("a", 2 * MIN_CHUNK, max_tokens=50)
    bench.add("b", 2 * MIN_CHUNK)
    alone, period = {"s": 1}, MAX_PASSED_OVER + 1
    assert bench.shapes(period) == [*[alone] * MAX_PASSED_OVER, {"s": 1, "a": MIN_CHUNK}]
    assert bench.scheduler.num_running == 2, "who gets no token takes no place and no blocks"
    assert bench.shapes(period) == [*[alone] * MAX_PASSED_OVER, {"s": 1, "a": MIN_CHUNK}]
    assert bench.shapes(period)[-1] == {"s": 1, "a": 1, "b": MIN_CHUNK}
    bench.bound()
    assert bench.shapes(1) == [{"s": 1, "a": 1, "b": MIN_CHUNK}], "lifted: the rest at once"


def test_who_was_left_out_and_then_finds_no_memory_is_the_next_one_all_the_same() -> None:
    bench = BudgetBench(num_blocks=24)
    stream = bench.stream(max_tokens=60)
    bench.bound(0.0)
    grant = bench.reserve("held", 4 * 20, arrival_s=-1.0)
    assert bench.scheduler.grant_reservations()
    bench.add("a", MIN_CHUNK)
    later = bench.reserve("later", 4, arrival_s=99.0)
    bench.shapes(MAX_PASSED_OVER)
    assert bench.shapes(2) == [{"s": 1}, {"s": 1}]
    assert bench.scheduler.grant_reservations() == [], "what becomes free is not for who came later"
    bench.scheduler.release_lent(list(bench.scheduler.loans.references()))
    bench.scheduler.abort(grant.request_id)
    assert bench.shapes(1) == [{"s": 1, "a": MIN_CHUNK}]
    assert later.block_table == []
    assert stream.output_token_ids


def test_a_prompt_that_is_cached_but_for_its_last_token_needs_no_room() -> None:
    bench = BudgetBench()
    prompt = [1, 2, 3, 0] * 20
    bench.add("first", prompt, max_tokens=1)
    bench.run_all()
    bench.stream()
    bench.bound(0.0, 0)
    bench.add("again", prompt)
    assert bench.shapes(1) == [{"s": 1, "again": 1}]


def test_room_is_asked_for_where_the_cache_ends() -> None:
    bench = BudgetBench()
    prompt = [1, 2, 3, 0] * 60
    bench.add("first", prompt, max_tokens=1)
    bench.run_all()
    bench.stream()
    bench.bound(tpot_s=1.1 + 100 * (RATES.prompt_token_s + RATES.prompt_pair_s * 240))
    bench.add("again", [*prompt, *[4] * 200])
    assert bench.step()[0]["again"] == pytest.approx(96, abs=4)


def test_before_the_first_step_is_learnt_the_smallest_chunk_is_carried() -> None:
    bench = BudgetBench(GUESSED)
    bench.bound(tpot_s=1e-9)
    bench.stream()
    bench.add("a", 100)
    assert bench.shapes(1) == [{"s": 1, "a": MIN_CHUNK}]
    bench.bound(prompt_tokens=60)
    assert bench.shapes(1) == [{"s": 1, "a": 60}], "a number of tokens needs no rates"


def test_beside_prompts_in_a_step_that_is_to_end_in_time_nobody_guesses() -> None:
    bench = BudgetBench(guesses=3)
    bench.stream()
    bench.bound(tpot_s=1.7)
    bench.add("a", 400)
    while True:
        batch = bench.scheduler.schedule()
        assert batch is not None
        carries = batch.shape.num_prompt_tokens > 0
        assert not (carries and any(sequence.draft for sequence in batch.sequences))
        bench.finish_step(batch)
        if not carries:
            break
    shapes = [bench.step()[0]["s"] for _ in range(10)]
    assert max(shapes) > 1, "without prompts it guesses, however little time there is"


def test_room_enough_makes_the_schedule_that_no_budgets_make() -> None:
    for seed in range(12):
        assert schedule_of(seed, UNBOUND) == schedule_of(seed, Budgets(1e9, 1 << 29))
        assert schedule_of(seed, UNBOUND, guesses=True) == schedule_of(
            seed, Budgets(prompt_tokens=1 << 29), guesses=True
        )


def schedule_of(seed: int, budgets: Budgets, *, guesses: bool = False) -> list[object]:
    """Random requests in a small pool: what each step takes part in, and from where."""
    rng = random.Random(seed)
    config = SchedulerConfig(
        BLOCK_SIZE, 64, "ab", max_num_seqs=5, max_num_batched_tokens=rng.randint(4, 40), max_prompt_logprob_rows=5
    )
    pool = BlockPool(20)
    scheduler = Scheduler(config, pool, Oracle(seed) if guesses else None, learnt())
    scheduler.prompt_budget.budgets = budgets
    world, schedule, requests = PagedWorld(pool, config), list[object](), list[Request]()
    for number in range(200):
        if number < 60 and rng.random() < 0.3:
            prompt = [1 + i % 3 for i in range(rng.randint(1, 40))] + [rng.randint(0, 5)]
            logprobs = 0 if rng.random() < 0.2 else None
            request = make_request(f"r{number}", prompt, max_tokens=rng.randint(1, 9), prompt_logprobs=logprobs)
            scheduler.add(request)
            requests.append(request)
        batch = scheduler.schedule()
        if batch is not None:
            rows = [(each.request.request_id, each.start, each.num_tokens, each.draft) for each in batch.sequences]
            schedule.append((rows, batch.copies, batch.new_block_ids))
            scheduler.update(batch, world.run(batch))
    for request in requests:
        assert request.output_token_ids == expected_outputs(request.prompt_token_ids, request.sampling, 64)
    return schedule


def test_a_new_step_forgets_the_streams_of_the_one_before() -> None:
    budget = PromptBudget(learnt())
    budget.budgets = Budgets(prompt_tokens=50)
    budget.begin([math.inf])
    assert (budget.is_bounded, budget.bounds_time) == (True, False)
    assert budget.room(StepShape(num_running=1), 0) == 50
    budget.begin([3.0])
    assert budget.bounds_time
    budget.begin([])
    assert not budget.is_bounded
    assert budget.room(NO_STEP, 0) == UNBOUND.prompt_tokens
