"""The one learner of rates: it finds what a worker's steps and fetches really cost, whatever disturbs them."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.rates import (
    GUESSED,
    RateLearner,
    Rates,
    StepShape,
    mean_rates,
    num_pairs,
    tokens_of,
)

CPU = Rates(0.05, 7e-4, 2.4e-7, 8e-4, 1.5e-6)
GPU = Rates(0.011, 6.4e-5, 3e-9, 6e-5, 8.5e-8)


def decode_step(rng: random.Random) -> StepShape:
    contexts = [rng.randint(50, 2000) for _ in range(rng.randint(1, 32))]
    return StepShape(0, 0, len(contexts), sum(contexts))


def prefill_step(rng: random.Random) -> StepShape:
    num_tokens = rng.choice([512, 512, rng.randint(2, 511)])
    return StepShape(num_tokens, num_pairs(rng.choice([0, 512, 1024]), num_tokens))


def mixed_step(rng: random.Random) -> StepShape:
    return prefill_step(rng) if rng.random() < 0.1 else decode_step(rng)


def misses(learned: Rates, true: Rates, make, rng: random.Random) -> list[float]:
    return [abs(learned.step_s(shape) / true.step_s(shape) - 1) for shape in (make(rng) for _ in range(50))]


@pytest.mark.parametrize("make", [decode_step, prefill_step, mixed_step])
@given(
    seed=st.integers(0, 10_000),
    coefficients=st.tuples(*(st.floats(0.2, 5) for _ in range(5))),
    machine=st.floats(0.001, 1000),
    noise=st.floats(0, 0.1),
    stalls=st.sampled_from([0.0, 0.02]),
)
@settings(max_examples=25, deadline=None)
def test_a_worker_s_formula_is_found_from_noisy_steps(make, seed, coefficients, machine, noise, stalls):
    rng = random.Random(seed)
    names = ("base_s", "prompt_token_s", "prompt_pair_s", "running_s", "context_token_s")
    true = Rates(**{name: machine * f * getattr(GUESSED, name) for name, f in zip(names, coefficients, strict=True)})
    learner = RateLearner()
    for _ in range(400):
        shape = make(rng)
        stall = rng.uniform(10, 200) if rng.random() < stalls else 1
        learner.step_ended(shape, true.step_s(shape) * rng.uniform(1 - noise, 1 + noise) * stall)
        assert min(asdict(learner.rates).values()) >= 0
        assert learner.rates.prompt_token_s > 0
    found = misses(learner.rates, true, make, rng)
    assert sum(found) / len(found) < 0.1
    assert max(found) < 0.5
    assert learner.rates.spread < 0.3


def test_one_step_tells_the_size_of_a_machine():
    for true in (CPU, GPU, replace(CPU, base_s=5.0)):
        learner = RateLearner()
        assert (learner.rates, learner.rates.num_steps) == (GUESSED, 0)
        shape = StepShape(512, num_pairs(0, 512))
        learner.step_ended(shape, true.step_s(shape))
        assert learner.rates.step_s(shape) == pytest.approx(true.step_s(shape), rel=0.05)
        # What was never done stays in proportion to what was.
        factor = true.step_s(shape) / GUESSED.step_s(shape)
        assert learner.rates.running_s == pytest.approx(factor * GUESSED.running_s, rel=0.01)


def test_decoding_for_hours_does_not_make_a_worker_forget_what_prompts_cost():
    rng, learner = random.Random(1), RateLearner()
    for make, count in ((mixed_step, 500), (decode_step, 5000)):
        for _ in range(count):
            shape = make(rng)
            learner.step_ended(shape, CPU.step_s(shape))
    assert max(misses(learner.rates, CPU, prefill_step, rng)) < 0.1


def test_a_machine_that_becomes_slower_is_noticed():
    rng, learner = random.Random(1), RateLearner()
    for factor in (1, 3):
        for _ in range(400):
            shape = prefill_step(rng)
            learner.step_ended(shape, factor * CPU.step_s(shape))
    assert learner.rates.prompt_s(512) == pytest.approx(3 * CPU.prompt_s(512), rel=0.15)


def test_a_single_stall_hardly_moves_the_rates():
    rng, learner = random.Random(1), RateLearner()
    for _ in range(100):
        shape = prefill_step(rng)
        learner.step_ended(shape, CPU.step_s(shape))
    before = learner.rates.prompt_s(512)
    for _ in range(8):
        learner.step_ended(shape, CPU.step_s(shape) * 100)
    assert learner.rates.prompt_s(512) == pytest.approx(before, rel=0.1)


@given(num_tokens=st.integers(0, 5000), more=st.integers(0, 5000), start=st.integers(0, 5000))
def test_a_prompt_costs_what_its_parts_do(num_tokens, more, start):
    parts = CPU.prompt_s(num_tokens, start) + CPU.prompt_s(more, start + num_tokens)
    assert CPU.prompt_s(num_tokens + more, start) == pytest.approx(parts)


def test_fetches_are_learned_by_tier():
    rng, learner = random.Random(1), RateLearner()
    true = {"device": 1 / 200_000, "host": 1 / 200_000, "store": 1 / 50_000, "disk": 1 / 2_000}
    for _ in range(400):
        tier, num_tokens = rng.choice(list(true)), rng.randint(32, 8192)
        learner.fetched("holder", tier, num_tokens, 0.02 + true[tier] * num_tokens)
    learner.fetched("holder", "tape", 10**6, 1e9)  # of a newer worker: not known here
    for tier, token_s in true.items():
        assert learner.rates.fetch_s(tokens_of(tier, 4096)) == pytest.approx(0.02 + token_s * 4096, rel=0.1)


def test_a_holder_that_is_slower_than_others_is_told_apart_and_the_memory_of_holders_is_bounded():
    learner = RateLearner()
    for number in range(1000):
        learner.fetched("slow", "device", 4096, 2.0)
        learner.fetched(f"holder-{number}", "device", 4096, 0.1)
    assert learner.slowness("slow") > 3 * learner.slowness("holder-999")
    assert learner.slowness("holder-0") == 1.0


def test_fetching_pays_where_it_is_sooner():
    assert CPU.fetching_pays(tokens_of("device", 256), 0)
    assert not CPU.fetching_pays(tokens_of("device", 256), 0, slowness=100)
    assert not GPU.fetching_pays(tokens_of("disk", 4096), 0)
    assert not GPU.fetching_pays(tokens_of("device", 32), 0)  # the latency alone is more
    assert replace(GPU, prompt_pair_s=1e-7).fetching_pays(tokens_of("device", 32), 20_000)  # late tokens are dear


@given(values=st.dictionaries(st.sampled_from([*asdict(CPU), "newer"]), st.floats()))
def test_what_a_peer_says_is_checked(values):
    rates = Rates.from_wire(values)
    assert all(0 <= value < 1e9 for value in asdict(rates).values())
    assert rates.prompt_token_s > 0
    assert Rates.from_wire(rates.to_wire()) == rates


def test_workers_count_in_their_mean_by_what_they_have_seen():
    assert mean_rates([]) == mean_rates([GUESSED, GUESSED]) == GUESSED
    learned = replace(CPU, num_steps=30.0, num_fetches=0.0, spread=0.1)
    faster = replace(CPU, prompt_token_s=1e-4, num_steps=10.0, fetch_latency_s=0.5, num_fetches=3.0)
    mean = mean_rates([GUESSED, learned, faster])
    assert mean.prompt_token_s == pytest.approx((3 * 7e-4 + 1e-4) / 4)
    assert (mean.fetch_latency_s, mean.num_steps, mean.num_fetches) == (0.5, 40.0, 3.0)
