"""Reuse to the token against a dumb oracle: every earlier sequence of the tenant is compared with the prompt."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import BlockHash
from kvstore.pool import BlockPool
from services.engine.api import SamplingParams
from services.engine.native.scheduling import Request
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.scheduler import Scheduler
from tests.engine.paged_world import PagedWorld, expected_outputs

BLOCK_SIZE = 4
MAX_MODEL_LEN = 40

# Heads of a few trunks, with tails of few different tokens: prompts part everywhere, most of them inside a block.
trunks = st.sampled_from([[1, 2, 3, 4, 5] * 7, [1, 2, 3, 4, 0] * 7, [2] * 35])
prompts = st.builds(
    lambda trunk, length, tail: trunk[:length] + tail,
    trunks,
    st.integers(0, 28),
    st.lists(st.integers(0, 5), min_size=1, max_size=7),
)
arrivals = st.lists(st.tuples(prompts, st.sampled_from(["", "tenant"])), min_size=2, max_size=12)


def make_world(num_blocks: int, max_num_batched_tokens: int) -> tuple[Scheduler, PagedWorld]:
    config = SchedulerConfig(
        BLOCK_SIZE,
        MAX_MODEL_LEN,
        "ab",
        max_num_seqs=6,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    pool = BlockPool(num_blocks)
    return Scheduler(config, pool), PagedWorld(pool, config)


def make_request(number: int, prompt: list[int], salt: str) -> Request:
    return Request(f"r{number}", prompt, SamplingParams(max_tokens=3, ignore_eos=True), cache_salt=salt)


def run_to_end(scheduler: Scheduler, world: PagedWorld) -> None:
    while scheduler.has_work:
        batch = scheduler.schedule()
        if batch is None:
            continue
        scheduler.check_integrity()
        scheduler.update(batch, world.run(batch))
        scheduler.check_integrity()


def num_common(one: list[int], other: list[int]) -> int:
    return next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


@given(arrivals=arrivals, max_num_batched_tokens=st.integers(1, 24))
@settings(max_examples=150, deadline=None)
def test_one_after_the_other_each_reuses_all_that_it_shares_with_full_blocks_before_it(
    arrivals: list[tuple[list[int], str]], max_num_batched_tokens: int
) -> None:
    scheduler, world = make_world(500, max_num_batched_tokens)
    cached: list[tuple[str, list[int]]] = []  # what lies in full blocks
    num_hits = 0
    for number, (prompt, salt) in enumerate(arrivals):
        request = make_request(number, prompt, salt)
        scheduler.add(request)
        run_to_end(scheduler, world)
        shared = max((num_common(prompt, tokens) for owner, tokens in cached if owner == salt), default=0)
        assert request.num_cached_tokens == min(shared, len(prompt) - 1)
        assert request.output_token_ids == expected_outputs(prompt, request.sampling, MAX_MODEL_LEN)
        num_hits += request.num_cached_tokens
        num_full = (request.num_tokens - 1) // BLOCK_SIZE  # the last token's KV is not computed
        cached.append((salt, request.token_ids[: num_full * BLOCK_SIZE]))
    assert scheduler.stats.num_prefix_hits == num_hits
    assert scheduler.stats.num_prompt_tokens == sum(len(prompt) for prompt, _ in arrivals) - num_hits


@given(arrivals=arrivals, num_blocks=st.integers(10, 20), max_num_batched_tokens=st.integers(6, 24))
@settings(max_examples=150, deadline=None)
def test_all_at_once_on_little_memory_each_has_the_tokens_that_it_has_alone(
    arrivals: list[tuple[list[int], str]], num_blocks: int, max_num_batched_tokens: int
) -> None:
    scheduler, world = make_world(num_blocks, max_num_batched_tokens)
    requests = [make_request(number, prompt, salt) for number, (prompt, salt) in enumerate(arrivals)]
    for request in requests:
        scheduler.add(request)
    run_to_end(scheduler, world)
    for request in requests:
        assert request.output_token_ids == expected_outputs(request.prompt_token_ids, request.sampling, MAX_MODEL_LEN)
    assert scheduler.stats.num_prefix_hits == sum(request.num_cached_tokens for request in requests)
    assert scheduler.pool.num_free == num_blocks


@given(prompt=prompts, num_choices=st.integers(2, 5), num_steps=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_the_choices_of_a_running_prompt_compute_its_last_token_each_and_no_more(
    prompt: list[int], num_choices: int, num_steps: int
) -> None:
    scheduler, world = make_world(500, 40)
    choices = [make_request(number, prompt, "") for number in range(num_choices)]
    scheduler.add(choices[0])
    for _ in range(num_steps):
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.update(batch, world.run(batch))
    stranger = make_request(99, prompt, "tenant")
    for request in [*choices[1:], stranger]:
        scheduler.add(request)
    run_to_end(scheduler, world)
    for request in [*choices, stranger]:
        assert request.output_token_ids == expected_outputs(prompt, request.sampling, MAX_MODEL_LEN)
    if num_steps < 3:  # else it has ended, and nothing but its full blocks is left
        assert [request.num_cached_tokens for request in choices[1:]] == [len(prompt) - 1] * (num_choices - 1)
    assert stranger.num_cached_tokens == 0


def test_a_running_request_with_wrong_hashes_is_nobodys_source_and_stops_no_engine() -> None:
    scheduler, world = make_world(50, max_num_batched_tokens=24)
    scheduler.add(make_request(1, [1, 2, 3, 4, 5, 1, 2, 3, 4], ""))
    run_to_end(scheduler, world)  # leaves two cached blocks
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    liar = Request("liar", [5, 5, 5, 5, 5], sampling, given_hashes=[BlockHash(b"another prompt's")])
    scheduler.add(liar)
    while liar.num_computed_tokens <= 2 * BLOCK_SIZE:
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.update(batch, world.run(batch))
    follower = make_request(2, [1, 2, 3, 4, 5, 1, 2, 3, 0, 0], "")
    scheduler.add(follower)
    run_to_end(scheduler, world)
    for request in (liar, follower):
        assert request.output_token_ids == expected_outputs(request.prompt_token_ids, request.sampling, MAX_MODEL_LEN)
