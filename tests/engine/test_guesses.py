"""Guesses by n-grams against a dumb oracle; how many are tried, against every other choice; what the scheduler does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.pool import BlockPool
from services.engine.api import SamplingParams
from services.engine.config import EngineConfig
from services.engine.native.scheduling import Request, Scheduler, SchedulerConfig
from services.engine.native.speculation import NgramSpeculation, Speculation
from services.engine.native.speculation.lengths import Acceptance, Row, choose_lengths
from services.engine.native.speculation.prompt_lookup import PromptLookup
from services.rates import RateLearner, Rates, StepShape
from services.settings import SettingsError
from tests.engine.paged_world import Oracle, PagedWorld, expected_outputs

# ---- what is guessed ----------------------------------------------------------------------


def looked_up(text: Sequence[int], num_tokens: int, min_tokens: int, max_tokens: int) -> list[int]:
    """Place by place, token by token."""
    best, best_place = min_tokens - 1, None
    for place in range(1, len(text)):
        length = 0
        while length < min(place, max_tokens) and text[place - 1 - length] == text[len(text) - 1 - length]:
            length += 1
        if length >= max(best, min_tokens):
            best, best_place = length, place
    if best_place is None:
        return []
    copied = list(text)
    for _ in range(num_tokens):
        copied.append(copied[len(copied) - len(text) + best_place])
    return copied[len(text) :]


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    cuts=st.sets(st.integers(1, 60), max_size=4),
    num_tokens=st.integers(1, 9),
    lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)).map(sorted),
)
def test_what_followed_the_longest_n_gram_is_found_however_the_text_came(
    text: list[int], cuts: set[int], num_tokens: int, lengths: list[int]
) -> None:
    lookup = PromptLookup(*lengths)
    for end in sorted({*(cut for cut in cuts if cut < len(text)), len(text)}):
        found = lookup.guess(text[:end], num_tokens)
        assert list(found) == looked_up(text[:end], num_tokens, *lengths)


def test_a_text_longer_than_its_room_is_kept() -> None:
    text, lookup = list(range(3000)), PromptLookup(2, 4)
    for end in range(1, 3000, 7):
        assert lookup.guess(text[:end], 4) == ()
    assert lookup.guess([*text, 17, 18, 19], 4) == (20, 21, 22, 23)


# ---- how many are tried ---------------------------------------------------------------------

seconds = st.floats(1e-5, 1.0)
rows = st.builds(Row, st.floats(0.0, 1.0), st.integers(0, 3), st.integers(1, 10_000))


def per_second(lengths: Sequence[int], rows: Sequence[Row], shape: StepShape, rates: Rates) -> float:
    tokens = sum(row.acceptance**i for row, length in zip(rows, lengths, strict=True) for i in range(length + 1))
    extra = [rates.running_s + rates.context_token_s * row.num_context_tokens for row in rows]
    return tokens / (rates.step_s(shape) + sum(map(lambda cost, n: cost * n, extra, lengths)))


@settings(max_examples=300)
@given(
    rows=st.lists(rows, min_size=1, max_size=4),
    rates=st.builds(Rates, base_s=seconds, running_s=seconds, context_token_s=st.floats(1e-9, 1e-5)),
    num_prompt_tokens=st.sampled_from([0, 0, 512]),
)
def test_no_other_lengths_are_expected_to_bring_more_tokens_a_second(
    rows: list[Row], rates: Rates, num_prompt_tokens: int
) -> None:
    shape = StepShape(num_prompt_tokens, 0, len(rows), sum(row.num_context_tokens for row in rows))
    chosen = choose_lengths(rows, 100, shape, rates)
    assert all(0 <= length <= row.max_guesses for length, row in zip(chosen, rows, strict=True))
    others = itertools.product(*(range(row.max_guesses + 1) for row in rows))
    best = max(per_second(lengths, rows, shape, rates) for lengths in others)
    assert per_second(chosen, rows, shape, rates) >= best * (1 - 1e-9)


@given(rows=st.lists(rows, min_size=1, max_size=6), max_guesses=st.integers(0, 8))
def test_a_step_s_budget_holds(rows: list[Row], max_guesses: int) -> None:
    shape = StepShape(0, 0, len(rows), 100)
    assert sum(choose_lengths(rows, max_guesses, shape, Rates())) <= max_guesses


@pytest.mark.parametrize(
    ("num_rows", "running_s", "acceptance", "tried"),
    [
        (1, 1e-4, 0.9, 16),  # the step reads weights: a token more costs nearly nothing
        (64, 1e-4, 0.9, 4),
        (64, 1e-2, 0.9, 0),  # a batch that computes all the time: a token costs its share of the step
        (1, 1e-4, 0.005, 0),  # what does not come true
        (1, 1e-4, 0.2, 2),
    ],
)
def test_guesses_are_tried_where_they_pay(num_rows: int, running_s: float, acceptance: float, tried: int) -> None:
    rates = Rates(base_s=0.01, running_s=running_s, context_token_s=1e-9)
    shape = StepShape(0, 0, num_rows, 100 * num_rows)
    assert choose_lengths([Row(acceptance, 16, 100)] * num_rows, 10_000, shape, rates) == [tried] * num_rows


def test_acceptance_is_learnt_from_what_came_tried_or_not() -> None:
    acceptance = Acceptance()
    for _ in range(50):
        acceptance.learn((7, 8), (7, 8, 9))
    assert acceptance.rate > 0.99
    for _ in range(50):
        acceptance.learn((7, 8), (1,))
    assert acceptance.rate < 0.01
    before = acceptance.rate
    acceptance.learn((), (1,))
    acceptance.learn((7,), ())
    assert acceptance.rate == before


# ---- in the scheduler ---------------------------------------------------------------------


class Bench:
    """A scheduler that guesses, on blocks of four tokens."""

    def __init__(self, speculation: Speculation, num_blocks: int = 100, **limits: int) -> None:
        defaults = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16}
        config = SchedulerConfig(block_size=4, model_fingerprint="ab", **{**defaults, **limits})
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(config, self.pool, speculation)
        self.world = PagedWorld(self.pool, config)

    def add(self, name: str, prompt: list[int], max_tokens: int) -> Request:
        request = Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        self.scheduler.add(request)
        return request

    def run(self) -> None:
        while self.scheduler.has_work:
            batch = self.scheduler.schedule()
            assert batch is not None
            self.scheduler.update(batch, self.world.run(batch))
            self.scheduler.check_integrity()


class Right(Oracle):
    """Nine guesses that come true."""

    def __init__(self) -> None:
        super().__init__(0)
        self._random.randint = lambda low, high: high if high == 9 else low  # type: ignore[method-assign]


@pytest.mark.parametrize("max_tokens", [1, 2, 10, 11, 30])
def test_many_tokens_a_step_and_not_one_too_many(max_tokens: int) -> None:
    bench, prompt = Bench(Right()), [1, 2, 3, 4, 5]
    request = bench.add("r", prompt, max_tokens)
    bench.run()
    assert request.output_token_ids == expected_outputs(prompt, request.sampling, 64)
    stats = bench.scheduler.stats
    assert stats.num_steps == 1 + -(-(max_tokens - 1) // 10)
    assert stats.num_draft_tokens == stats.num_accepted_tokens == max_tokens - stats.num_steps
    assert (stats.num_generated_tokens, stats.num_prompt_tokens) == (max_tokens, 5)


def test_the_model_s_context_bounds_guesses() -> None:
    bench = Bench(Right(), max_model_len=9)
    request = bench.add("r", [1, 2, 3, 4, 5], 30)
    bench.run()
    assert len(request.output_token_ids) == 4
    assert bench.scheduler.stats.num_draft_tokens == 2


def test_nobody_is_preempted_for_guesses_which_take_free_blocks_alone() -> None:
    plain, bench = Bench(Oracle(0), num_blocks=6), Bench(Right(), num_blocks=6)
    plain.scheduler._speculation = None
    for each in (plain, bench):
        requests = [each.add(name, [1, 2, 3], 9) for name in "ab"]
        each.run()
        assert each.scheduler.stats.num_preemptions == 0
        for request in requests:
            assert request.output_token_ids == expected_outputs([1, 2, 3], request.sampling, 64)
        assert each.pool.num_free == 6
    assert bench.scheduler.stats.num_steps < plain.scheduler.stats.num_steps


def test_guesses_take_what_a_prompt_leaves_of_the_budget() -> None:
    bench = Bench(Right(), max_num_batched_tokens=8)
    bench.add("first", [1, 2, 3], 20)
    batch = bench.scheduler.schedule()
    assert batch is not None
    bench.scheduler.update(batch, bench.world.run(batch))
    bench.add("long", [5] * 11, 2)
    tokens = []
    for _ in range(2):
        batch = bench.scheduler.schedule()
        assert batch is not None
        tokens.append([(each.num_known, len(each.draft)) for each in batch.sequences])
        bench.scheduler.update(batch, bench.world.run(batch))
    assert tokens == [[(1, 0), (7, 0)], [(1, 3), (4, 0)]]
    bench.run()


def test_a_batch_s_shape_counts_guesses_as_sequences_that_generate() -> None:
    bench = Bench(Right())
    bench.add("r", [1, 2, 3], 20)
    shapes = []
    for _ in range(2):
        batch = bench.scheduler.schedule()
        assert batch is not None
        shapes.append(batch.shape)
        bench.scheduler.update(batch, bench.world.run(batch))
    assert shapes == [StepShape(3, 6, 0, 0), StepShape(0, 0, 10, sum(range(4, 14)))]


def test_how_long_steps_take_decides_what_is_tried() -> None:
    num_tried = []
    for per_row_s in (1e-5, 1e-2):
        speculation = NgramSpeculation(8, 1, 4, RateLearner())
        for num_rows in [1, 2, 4, 8] * 20:
            speculation.rates.step_ended(StepShape(0, 0, num_rows, 10 * num_rows), 0.01 + per_row_s * num_rows)
        bench = Bench(speculation, max_num_seqs=8, max_num_batched_tokens=64)
        requests = [bench.add(f"{i}", [1, 2, 3, i], 50) for i in range(8)]
        bench.run()
        for request in requests:
            assert request.output_token_ids == expected_outputs(request.prompt_token_ids, request.sampling, 64)
        num_tried.append(bench.scheduler.stats.num_draft_tokens)
    assert num_tried[0] > 400 > 40 > num_tried[1]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"prompt_lookup_min": 5, "prompt_lookup_max": 4}, "prompt_lookup_min"),
        ({"engine": "vllm", "speculative_method": "ngram"}, "speculative_method"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"speculative_method": "draft_model"}, "speculative_method"),
        ({"speculative_model": "small"}, "speculative_model"),
        ({"speculative_method": "ngram", "speculative_model": "small"}, "speculative_model"),
        ({"engine": "vllm", "speculative_method": "draft_model", "speculative_model": "small"}, "speculative_method"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(settings: dict[str, object], name: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        EngineConfig("model", **settings)  # type: ignore[arg-type]
    assert refusal.value.setting == name
