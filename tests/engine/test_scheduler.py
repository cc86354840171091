"""The scheduler's rules one by one, on a pool small enough to count on one's fingers."""

from __future__ import annotations

import pytest

from kvstore.block import hash_blocks, namespace
from kvstore.pool import BlockPool
from services.engine.api import (
    FinishReason,
    InvalidRequest,
    NotLent,
    QueueFull,
    RequestUpdate,
    SampledToken,
    SamplingParams,
)
from services.engine.native.scheduling import Request
from services.engine.native.scheduling.batch import Batch, SampledBatch, SampledSequence
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.request import RequestStatus
from services.engine.native.scheduling.scheduler import NotReserved, Scheduler
from tests.engine.paged_world import PagedWorld, expected_outputs

BLOCK_SIZE = 4

PROOFS = list(range(100))  # of blocks that came from elsewhere: nobody here looks


class Bench:
    """A scheduler, its pool and a world to run its batches in."""

    def __init__(self, *, num_blocks: int = 100, **limits: int) -> None:
        defaults = {"max_model_len": 64, "max_num_seqs": 8, "max_num_batched_tokens": 16}
        self.config = SchedulerConfig(block_size=BLOCK_SIZE, model_fingerprint="ab", **{**defaults, **limits})
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(self.config, self.pool)
        self.world = PagedWorld(self.pool, self.config)

    def add(self, request_id: str, prompt: int | list[int], *, max_tokens: int = 8, **options: object) -> Request:
        request = make_request(request_id, prompt, max_tokens=max_tokens, **options)
        self.scheduler.add(request)
        return request

    def reserve(self, request_id: str, prompt: int | list[int], **options: object) -> Request:
        request = make_request(request_id, prompt, max_tokens=8, **options)
        self.scheduler.reserve(request)
        return request

    def finish_step(self, batch: Batch) -> list[RequestUpdate]:
        updates = self.scheduler.update(batch, self.world.run(batch))
        self.scheduler.check_integrity()
        return updates

    def step(self) -> tuple[dict[str, int], list[RequestUpdate]]:
        """One step: tokens scheduled per request, in order, and the updates."""
        batch = self.scheduler.schedule()
        if batch is None:
            return {}, []
        shape = {sequence.request.request_id: sequence.num_tokens for sequence in batch.sequences}
        return shape, self.finish_step(batch)

    def shapes(self, num_steps: int) -> list[dict[str, int]]:
        return [self.step()[0] for _ in range(num_steps)]

    def run_all(self) -> None:
        for _ in range(1000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("no end")


def make_request(request_id: str, prompt: int | list[int], *, max_tokens: int = 8, **options: object) -> Request:
    token_ids = [ord(request_id[0]) % 5] * prompt if isinstance(prompt, int) else prompt
    names = ("prompt_logprobs", "min_tokens")
    sampling = {name: options.pop(name) for name in names if name in options}
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    return Request(request_id, token_ids, params, **options)  # type: ignore[arg-type]


def test_decode_rows_come_first_and_prompts_share_what_is_left_of_the_budget() -> None:
    bench = Bench()
    bench.add("a", 6)
    assert bench.shapes(1) == [{"a": 6}]
    bench.add("b", 10)
    bench.add("c", 10)
    assert bench.shapes(3) == [{"a": 1, "b": 10, "c": 5}, {"a": 1, "b": 1, "c": 5}, {"a": 1, "b": 1, "c": 1}]


def test_smaller_priority_goes_first_and_equals_in_order_of_arrival() -> None:
    bench = Bench(max_num_batched_tokens=4, max_num_seqs=4)
    for name, arrival_s, priority in (("late", 9.0, 0), ("early", 1.0, 0), ("urgent", 10.0, -1), ("same", 9.0, 0)):
        bench.add(name, 4, max_tokens=1, arrival_s=arrival_s, priority=priority)
    assert [list(shape) for shape in bench.shapes(4)] == [["urgent"], ["early"], ["late"], ["same"]]


def test_a_step_reports_progress_first_chunk_and_first_token() -> None:
    bench = Bench()
    bench.add("a", 20)
    _, (first,) = bench.step()
    assert (first.num_computed_tokens, first.new_tokens) == (16, ())
    _, (second,) = bench.step()
    assert (second.num_computed_tokens, len(second.new_tokens)) == (20, 1)


def test_requests_end_with_the_tokens_that_they_have_alone() -> None:
    bench = Bench()
    requests = [bench.add(name, length, max_tokens=9) for name, length in (("a", 1), ("b", 17), ("c", 40))]
    bench.run_all()
    for request in requests:
        assert request.output_token_ids == expected_outputs(request.prompt_token_ids, request.sampling, 64)
        assert request.finish_reason is FinishReason.LENGTH
    assert bench.pool.num_free == bench.pool.num_blocks


def test_the_context_ends_a_request() -> None:
    bench = Bench(max_model_len=12)
    request = bench.add("a", 10, max_tokens=100)
    bench.run_all()
    assert request.finish_reason is FinishReason.LENGTH
    assert len(request.output_token_ids) == 2


def test_equal_prefixes_are_computed_once() -> None:
    bench = Bench()
    prompt = [1, 2, 3, 0] * 2
    bench.add("a", [*prompt, 1], max_tokens=1)
    bench.run_all()
    again = bench.add("b", [*prompt, 2, 3], max_tokens=1)
    assert bench.shapes(1) == [{"b": 2}]
    assert again.num_cached_tokens == 8
    assert (bench.scheduler.stats.num_prefix_queries, bench.scheduler.stats.num_prefix_hits) == (19, 8)


def test_a_prefix_that_is_being_computed_is_waited_for_and_not_computed_again() -> None:
    bench = Bench(max_num_batched_tokens=6)
    prompt = [1, 2, 3, 0] * 2
    bench.add("a", [*prompt, 1])
    bench.add("b", [*prompt, 2])
    other = bench.add("other", [3, 3, 3])
    # "b" waits for both blocks of "a" and is passed by whoever shares nothing with it.
    assert bench.shapes(2) == [{"a": 6}, {"a": 3, "other": 3}]
    assert other.output_token_ids
    assert bench.shapes(1) == [{"a": 1, "other": 1, "b": 1}]


def test_a_prompt_no_longer_waits_for_a_block_whose_computation_was_aborted() -> None:
    bench = Bench(max_num_batched_tokens=4)
    prompt = [1, 2, 3, 0] * 2
    bench.add("a", [*prompt, 1])
    bench.add("b", [*prompt, 2])
    assert bench.shapes(1) == [{"a": 4}]
    bench.scheduler.abort("a")
    assert bench.shapes(1) == [{"b": 4}], "the first block is cached, the second is computed by b"


def test_short_prompts_that_share_no_full_block_run_together() -> None:
    bench = Bench()
    bench.add("a", [1, 2, 3])
    bench.add("b", [1, 2, 3])
    assert bench.shapes(1) == [{"a": 3, "b": 3}]


def test_generated_blocks_are_found_by_the_next_turn() -> None:
    bench = Bench()
    first = bench.add("a", 6, max_tokens=7)
    bench.run_all()
    # 12 of 13 tokens have their KV computed.
    bench.add("b", [*first.token_ids, 1])
    assert bench.shapes(1) == [{"b": 2}]


def test_a_full_hit_computes_only_the_last_token_in_a_copy_of_the_last_block() -> None:
    bench = Bench()
    prompt = [1, 2, 3, 0] * 2
    first = bench.add("a", prompt, max_tokens=4)
    bench.step()
    shared = list(first.block_table)
    bench.add("b", prompt, max_tokens=4)
    batch = bench.scheduler.schedule()
    assert batch is not None
    row = batch.sequences[-1]
    assert (row.request.request_id, row.start, row.num_tokens) == ("b", 7, 1)
    assert row.request.block_table[0] == shared[0]
    assert batch.copies == ((shared[1], row.request.block_table[1], 3),)
    assert row.request.block_table[1] not in batch.new_block_ids
    bench.finish_step(batch)
    bench.run_all()


def hold_all_free_blocks(bench: Bench) -> list[int]:
    """An aborted transfer keeps what it was granted until it has ended."""
    request = bench.reserve("filler", 4 * bench.pool.num_free, arrival_s=-1.0)
    ((_, grant),) = bench.scheduler.grant_reservations()
    bench.scheduler.abort(request.request_id)
    assert bench.pool.num_free == 0
    return grant.block_ids


def test_a_full_hit_needs_no_spare_block_where_it_is_the_only_holder() -> None:
    bench = Bench(num_blocks=4)
    prompt = [1, 2, 3, 0] * 2
    bench.add("a", prompt, max_tokens=1)
    bench.run_all()
    found = bench.pool.match_prefix(hash_blocks(namespace("ab"), prompt, BLOCK_SIZE))
    held = hold_all_free_blocks(bench)
    bench.pool.release(found)
    request = bench.add("b", prompt, max_tokens=1)
    assert bench.shapes(1) == [{"b": 1}]
    assert request.output_token_ids == expected_outputs(prompt, request.sampling, 64)
    # The block was not findable while it was written to; it is again.
    assert bench.pool.peek_prefix(hash_blocks(namespace("ab"), prompt, BLOCK_SIZE)) == 2
    bench.scheduler.release_lent(held)


def test_a_full_hit_waits_for_a_spare_block_where_others_hold_the_last_one() -> None:
    bench = Bench(num_blocks=4)
    prompt = [1, 2, 3, 0] * 2
    first = bench.add("a", prompt, hold_blocks=True)
    bench.run_all()
    held = hold_all_free_blocks(bench)
    second = bench.add("b", prompt, max_tokens=1)
    assert bench.shapes(1) == [{}]
    bench.scheduler.release_lent(held)
    assert bench.shapes(1) == [{"b": 1}]
    bench.scheduler.release_lent(first.block_table)
    assert second.output_token_ids == first.output_token_ids


# ---- tokens shared inside a block -------------------------------------------------


def test_tokens_shared_inside_a_block_are_copied_and_not_computed() -> None:
    bench = Bench()
    first = bench.add("a", [1, 2, 3, 0, 1, 2, 3, 0, 4], max_tokens=1)
    bench.step()
    first_blocks = bench.pool.match_prefix(first.block_hashes)
    block_id = first_blocks[1]
    second = bench.add("b", [1, 2, 3, 0, 1, 2, 4, 4, 4, 4], max_tokens=1)
    batch = bench.scheduler.schedule()
    assert batch is not None
    (row,) = batch.sequences
    assert (row.start, row.num_tokens) == (6, 4)
    assert batch.copies == ((block_id, second.block_table[1], 2),)
    assert batch.new_block_ids == (second.block_table[2],)
    bench.pool.release(first_blocks)
    bench.finish_step(batch)
    assert second.output_token_ids == expected_outputs(second.prompt_token_ids, second.sampling, 64)


def run_to_end(bench: Bench, prompts: list[list[int]]) -> list[Request]:
    requests = []
    for number, prompt in enumerate(prompts):
        requests.append(bench.add(f"r{number}", prompt, max_tokens=1))
        bench.run_all()
    return requests


@pytest.mark.parametrize(
    ("prompt", "num_reused"),
    [
        ([1, 2], 1),  # ends inside the block, where the last token is computed for its logits
        ([1, 2, 3], 2),
        ([1, 2, 4], 2),
        ([1, 2, 3, 0], 3),  # the whole block is there: the copy is one of a full hit
        ([1, 2, 3, 4], 3),
        ([1, 2, 3, 0, 1], 4),  # a block of the cache, nothing in the next
        ([1, 2, 3, 0, 5], 4),
        ([1, 2, 3, 0, 5, 6, 6], 5),
        ([4, 2, 3, 0], 0),
        ([1], 0),
    ],
)
def test_how_much_of_a_prompt_is_reused(prompt: list[int], num_reused: int) -> None:
    bench = Bench()
    *_, request = run_to_end(bench, [[1, 2, 3, 0, 5, 5, 5, 5], prompt])
    assert request.num_cached_tokens == num_reused
    assert request.output_token_ids == expected_outputs(prompt, request.sampling, 64)


def test_the_sibling_that_shares_most_is_copied() -> None:
    bench = Bench()
    *_, last = run_to_end(bench, [[1, 1, 0, 0], [1, 2, 3, 0], [1, 2, 3, 4], [1, 2, 2, 2], [1, 2, 3, 5, 5]])
    assert last.num_cached_tokens == 3
    assert bench.scheduler.stats.num_partial_hit_tokens == 0 + 1 + 3 + 2 + 3
    assert bench.scheduler.stats.num_prefix_hits == 9


def test_tokens_inside_a_block_are_not_shared_across_salts() -> None:
    bench = Bench()
    prompt = [1, 2, 3, 0, 1, 2, 3, 0]
    for name, salt, num_reused in (("a", "x", 0), ("b", "y", 0), ("c", "", 0), ("d", "x", 6), ("e", "y", 6)):
        request = bench.add(name, [*prompt[:6], ord(name) % 4 + 2, 6], max_tokens=1, cache_salt=salt)
        bench.run_all()
        assert request.num_cached_tokens == num_reused, name


def test_prompt_logprobs_copy_nothing() -> None:
    bench = Bench()
    run_to_end(bench, [[1, 2, 3, 0]])
    request = bench.add("b", [1, 2, 3, 1, 1], max_tokens=1, prompt_logprobs=0)
    bench.run_all()
    assert (request.num_cached_tokens, bench.scheduler.stats.num_partial_hit_tokens) == (0, 0)


def test_without_a_prefix_cache_nothing_is_copied() -> None:
    bench = Bench()
    bench.pool.enable_prefix_caching = False
    *_, request = run_to_end(bench, [[1, 2, 3, 0], [1, 2, 3, 1]])
    assert request.num_cached_tokens == 0


def test_a_block_that_is_copied_from_is_held_until_the_step_has_ended() -> None:
    bench = Bench(num_blocks=4)
    (first,) = run_to_end(bench, [[1, 2, 3, 0]])
    (source,) = bench.pool.match_prefix(first.block_hashes)
    bench.pool.release([source])
    bench.add("b", [1, 2, 3, 1, 1], max_tokens=1)
    bench.add("c", [3, 3, 3], max_tokens=1)
    batch = bench.scheduler.schedule()
    assert batch is not None
    assert [copy.source for copy in batch.copies] == [source]
    # The third free block is not given to "c": it is the source, and evicted only when the copy has been made.
    assert [sequence.request.request_id for sequence in batch.sequences] == ["b"]
    assert (bench.pool.num_references(source), bench.pool.num_free) == (1, 1)
    bench.scheduler.check_integrity()
    sampled = bench.world.run(batch)
    assert bench.scheduler.abort("b")
    assert bench.pool.num_references(source) == 1
    bench.scheduler.check_integrity()
    bench.scheduler.update(batch, sampled)
    assert bench.pool.num_references(source) == 0
    assert bench.pool.num_free == 4
    bench.run_all()


def test_a_source_evicted_by_the_very_request_that_wants_it_is_not_copied() -> None:
    bench = Bench(num_blocks=2)
    run_to_end(bench, [[1, 2, 3, 0]])
    request = bench.add("b", [1, 2, 3, 1, 1], max_tokens=1)
    bench.run_all()
    assert request.num_cached_tokens == 0
    assert request.output_token_ids == expected_outputs(request.prompt_token_ids, request.sampling, 64)


def test_preemption_counts_no_hit_twice_and_changes_no_token() -> None:
    bench = Bench(num_blocks=5)
    first = bench.add("a", [1, 2, 3, 0, 1], max_tokens=12)
    second = bench.add("b", [1, 2, 3, 1, 1], max_tokens=8, arrival_s=1.0)
    bench.run_all()
    assert second.num_preemptions > 0
    for request in (first, second):
        assert request.output_token_ids == expected_outputs(request.prompt_token_ids, request.sampling, 64)
    assert bench.scheduler.stats.num_prefix_hits == first.num_cached_tokens + second.num_cached_tokens


def test_parts_of_fetched_blocks_are_found_once_a_prompt_has_used_them() -> None:
    bench = Bench()
    prompt = [1, 2, 3, 0, 2, 2, 2, 2]
    hashes = hash_blocks(namespace("ab"), prompt, BLOCK_SIZE)
    taken = bench.scheduler.take_prefix(hashes)
    assert taken is not None
    for index, block_id in enumerate(taken.block_ids):
        bench.world.blocks[block_id] = list(prompt[BLOCK_SIZE * index : BLOCK_SIZE * (index + 1)])
    bench.scheduler.publish_lent(taken.block_ids, hashes, taken.block_ids)
    bench.scheduler.release_lent(taken.block_ids)
    *_, third = run_to_end(bench, [[*prompt, 1], [*prompt[:7], 1]])
    assert third.num_cached_tokens == 7


# ---- isolation, and what is computed in any case -----------------------------------


def test_salts_separate_tenants() -> None:
    bench = Bench()
    for name, salt, num_computed in (("a", "x", 9), ("b", "y", 9), ("c", "x", 1)):
        bench.add(name, [1, 2, 3] * 3, max_tokens=1, cache_salt=salt)
        assert bench.shapes(1) == [{name: num_computed}]


def test_prompt_logprobs_are_computed_afresh_within_their_own_budget() -> None:
    bench = Bench(max_prompt_logprob_rows=6)
    prompt = [1, 2, 3, 0] * 2
    bench.add("a", prompt, max_tokens=1)
    bench.run_all()
    request = bench.add("b", prompt, max_tokens=2, prompt_logprobs=0)
    assert bench.shapes(1) == [{"b": 6}]
    shape, (update,) = bench.step()
    assert shape == {"b": 2}
    assert request.num_cached_tokens == 0
    assert update.prompt_logprobs is not None
    assert [None if p is None or p.chosen is None else p.chosen.token_id for p in update.prompt_logprobs] == [
        None,
        *prompt[1:],
    ]
    _, (last,) = bench.step()
    assert last.prompt_logprobs is None


def test_the_last_in_the_order_is_preempted_and_continues_with_the_same_tokens() -> None:
    bench = Bench(num_blocks=7)
    first = bench.add("a", 8, max_tokens=12)
    second = bench.add("b", 8, max_tokens=12)
    while not second.num_preemptions:
        bench.step()
    assert (second.status, second.block_table, second.num_computed_tokens) == (RequestStatus.PREEMPTED, [], 0)
    assert first.status is RequestStatus.RUNNING
    assert len(second.output_token_ids) > 0
    bench.run_all()
    assert first.num_preemptions == 0
    for request in (first, second):
        assert request.output_token_ids == expected_outputs(request.prompt_token_ids, request.sampling, 64)


def test_a_less_urgent_request_is_preempted_first_although_it_came_first() -> None:
    bench = Bench(num_blocks=7)
    lesser = bench.add("a", 8, max_tokens=12, priority=1)
    bench.step()
    urgent = bench.add("b", 8, max_tokens=12, priority=0)
    bench.run_all()
    assert urgent.num_preemptions == 0
    assert lesser.num_preemptions > 0


def test_who_enters_leaves_a_block_for_each_that_runs() -> None:
    bench = Bench(num_blocks=5)
    bench.add("a", 8, max_tokens=4)
    bench.step()
    bench.add("b", 8, max_tokens=4)
    assert bench.shapes(1) == [{"a": 1}]
    assert bench.pool.num_free == 2
    bench.scheduler.abort("b")
    bench.add("c", 4, max_tokens=4)
    assert bench.shapes(1) == [{"a": 1, "c": 4}]


def test_the_queue_is_bounded() -> None:
    bench = Bench(max_num_waiting=2)
    bench.add("a", 1)
    bench.reserve("b", 1)
    with pytest.raises(QueueFull, match="2 requests wait"):
        bench.add("c", 1)


def test_a_reservation_is_not_refused_for_others_who_wait_since_its_prompt_is_being_computed() -> None:
    bench = Bench(max_num_waiting=1)
    bench.add("a", 1)
    bench.reserve("b", 1)
    with pytest.raises(InvalidRequest):
        bench.reserve("c", 10_000)


def test_an_id_in_use_is_refused() -> None:
    bench = Bench()
    bench.add("a", 1)
    with pytest.raises(InvalidRequest, match="a is in use"):
        bench.add("a", 1)


def test_a_request_whose_logits_are_bad_ends_with_an_error_and_publishes_nothing() -> None:
    bench = Bench()
    request = bench.add("a", 9)
    batch = bench.scheduler.schedule()
    assert batch is not None
    (update,) = bench.scheduler.update(batch, SampledBatch((SampledSequence(failure="3 logits are not finite"),)))
    assert (update.finish_reason, update.failure) == (FinishReason.ERROR, "3 logits are not finite")
    assert request.is_finished
    assert (len(bench.pool), bench.pool.num_free) == (0, 100)


# ---- blocks that callers hold ---------------------------------------------------


def test_held_blocks_pass_to_the_caller_with_the_first_token() -> None:
    bench = Bench()
    request = bench.add("a", 9, hold_blocks=True)
    _, (update,) = bench.step()
    assert update.finish_reason is FinishReason.HANDED_OFF
    assert len(request.block_table) == 3
    assert bench.pool.num_free == 97
    bench.scheduler.release_lent(request.block_table)
    bench.scheduler.check_integrity()
    assert bench.pool.num_free == 100


def test_a_block_given_back_twice_is_noticed() -> None:
    bench = Bench()
    request = bench.add("a", 9, hold_blocks=True)
    bench.step()
    bench.scheduler.release_lent(request.block_table)
    with pytest.raises(NotLent):
        bench.scheduler.release_lent(request.block_table)
    bench.scheduler.check_integrity()


def test_lent_blocks_outlive_their_request() -> None:
    bench = Bench()
    request = bench.add("a", 8)
    bench.step()
    block_ids = list(request.block_table)
    bench.scheduler.loans.lend(block_ids)
    bench.scheduler.abort("a")
    bench.scheduler.check_integrity()
    assert bench.pool.num_free == 98
    bench.scheduler.release_lent(block_ids)
    assert bench.pool.num_free == 100


# ---- reservations ---------------------------------------------------------------


def test_a_reservation_brings_what_the_prefix_cache_has_and_joins_the_batch() -> None:
    bench = Bench()
    prompt = [1, 2, 3, 0] * 2
    bench.add("a", prompt, max_tokens=1)
    bench.run_all()
    request = bench.reserve("b", [*prompt, 1, 2])
    ((granted_to, grant),) = bench.scheduler.grant_reservations()
    assert (granted_to, grant.num_present, len(grant.block_ids)) == (request, 2, 3)
    bench.scheduler.check_integrity()
    bench.world.transfer(request, grant.block_ids, grant.num_present)
    outputs = expected_outputs(request.prompt_token_ids, request.sampling, 64)
    update = bench.scheduler.add_prefilled(request, grant.block_ids, PROOFS, SampledToken(outputs[0]))
    assert (update.finish_reason, update.new_tokens[0].token_id) == (None, outputs[0])
    assert bench.shapes(1) == [{"b": 1}]
    bench.run_all()
    assert request.output_token_ids == outputs


def test_transferred_blocks_are_found_by_later_prompts() -> None:
    bench = Bench()
    request = bench.reserve("a", [1, 2, 3] * 3)
    ((_, grant),) = bench.scheduler.grant_reservations()
    bench.world.transfer(request, grant.block_ids, 0)
    root = namespace("ab")
    assert bench.pool.peek_prefix(hash_blocks(root, request.prompt_token_ids, BLOCK_SIZE)) == 0
    bench.scheduler.add_prefilled(request, grant.block_ids, PROOFS, SampledToken(1))
    assert bench.pool.peek_prefix(hash_blocks(root, request.prompt_token_ids, BLOCK_SIZE)) == 2


def test_a_prefilled_request_that_is_preempted_computes_its_prompt_here() -> None:
    bench = Bench(num_blocks=7)
    bench.add("a", 8, max_tokens=16)
    bench.step()
    request = bench.reserve("b", 8, arrival_s=1.0)
    ((_, grant),) = bench.scheduler.grant_reservations()
    bench.world.transfer(request, grant.block_ids, 0)
    outputs = expected_outputs(request.prompt_token_ids, request.sampling, 64)
    bench.scheduler.add_prefilled(request, grant.block_ids, PROOFS, SampledToken(outputs[0]))
    bench.run_all()
    assert request.num_preemptions > 0
    assert request.output_token_ids == outputs


def test_a_reservation_waits_for_room_and_is_granted_when_a_request_ends() -> None:
    bench = Bench(num_blocks=6)
    bench.add("a", 16, max_tokens=2)
    bench.step()
    bench.reserve("b", 8)
    assert bench.scheduler.grant_reservations() == []
    bench.run_all()
    ((granted_to, _),) = bench.scheduler.grant_reservations()
    assert granted_to.request_id == "b"


def test_a_later_reservation_does_not_pass_a_prompt_that_waits_for_memory() -> None:
    bench = Bench(num_blocks=6)
    bench.add("a", 8, max_tokens=12)
    bench.step()
    bench.add("b", 16, arrival_s=1.0)
    bench.step()
    bench.reserve("c", 4, arrival_s=2.0)
    assert bench.scheduler.grant_reservations() == []
    bench.reserve("d", 4, arrival_s=0.5)
    assert [granted_to.request_id for granted_to, _ in bench.scheduler.grant_reservations()] == ["d"]


def test_a_later_prompt_does_not_pass_a_reservation_that_waits_for_memory() -> None:
    bench = Bench(num_blocks=6)
    bench.add("a", 8, max_tokens=12)
    bench.step()
    bench.reserve("b", 16, arrival_s=1.0)
    bench.add("c", 4, arrival_s=2.0)
    assert bench.scheduler.grant_reservations() == []
    assert bench.shapes(1) == [{"a": 1}]


def test_reservations_count_as_running() -> None:
    bench = Bench(max_num_seqs=2)
    bench.reserve("a", 4)
    bench.reserve("b", 4)
    bench.reserve("c", 4)
    grants = bench.scheduler.grant_reservations()
    assert [granted_to.request_id for granted_to, _ in grants] == ["a", "b"]
    bench.add("d", 4)
    assert not bench.shapes(1)[0]
    assert not bench.scheduler.has_work
    first, room = grants[0]
    bench.scheduler.release_reservation(first, room.block_ids)
    assert first.status is RequestStatus.NEW
    assert [granted_to.request_id for granted_to, _ in bench.scheduler.grant_reservations()] == ["c"]


def test_a_failed_reservation_can_be_prefilled_here() -> None:
    bench = Bench()
    request = bench.reserve("a", 9)
    ((_, grant),) = bench.scheduler.grant_reservations()
    bench.scheduler.release_reservation(request, grant.block_ids)
    assert bench.pool.num_free == 100
    bench.scheduler.add(request)
    bench.run_all()
    assert request.output_token_ids == expected_outputs(request.prompt_token_ids, request.sampling, 64)


def test_a_reservation_can_be_cancelled_until_it_is_granted() -> None:
    bench = Bench()
    first, second = bench.reserve("a", 9), bench.reserve("b", 9)
    assert bench.scheduler.cancel_reservation(second)
    ((granted_to, _),) = bench.scheduler.grant_reservations()
    assert (granted_to, second.status) == (first, RequestStatus.NEW)
    assert not bench.scheduler.cancel_reservation(first)


def test_a_request_aborted_during_its_transfer_cannot_join_and_leaves_its_blocks_to_the_caller() -> None:
    bench = Bench()
    request = bench.reserve("a", 9)
    ((_, grant),) = bench.scheduler.grant_reservations()
    assert bench.scheduler.abort("a")
    with pytest.raises(NotReserved, match="a is not here"):
        bench.scheduler.add_prefilled(request, grant.block_ids, PROOFS, SampledToken(1))
    bench.scheduler.check_integrity()
    assert bench.pool.num_free == 97
    bench.scheduler.release_reservation(request, grant.block_ids)
    assert bench.pool.num_free == 100


def test_blocks_of_another_cannot_be_joined() -> None:
    bench = Bench()
    request = bench.reserve("a", 9)
    ((_, grant),) = bench.scheduler.grant_reservations()
    with pytest.raises(NotLent):
        bench.scheduler.add_prefilled(request, [50, 51, 52], PROOFS, SampledToken(1))
    with pytest.raises(NotReserved, match="2 blocks"):
        bench.scheduler.add_prefilled(request, grant.block_ids[:2], PROOFS, SampledToken(1))
    bench.scheduler.check_integrity()


# ---- aborts -----------------------------------------------------------------------


def test_an_abort_frees_everything_in_every_status() -> None:
    bench = Bench(num_blocks=7)
    requests = [
        bench.add("running", 8, max_tokens=16),
        bench.add("preempted", 8, max_tokens=12, arrival_s=1.0),
    ]
    while not requests[1].num_preemptions:
        bench.step()
    requests += [bench.add("waiting", 9, arrival_s=2.0), bench.reserve("reserving", 9, arrival_s=3.0)]
    statuses = [request.status.value for request in requests]
    assert statuses == ["running", "preempted", "waiting", "reserving"]
    for request in requests:
        assert bench.scheduler.abort(request.request_id)
        assert not bench.scheduler.abort(request.request_id)
        assert request.finish_reason is FinishReason.ABORT
        bench.scheduler.check_integrity()
    assert bench.pool.num_free == 7
    assert not bench.scheduler.has_work


def test_blocks_of_a_request_aborted_in_mid_step_are_free_only_after_the_step() -> None:
    bench = Bench()
    request = bench.add("a", 9)
    batch = bench.scheduler.schedule()
    assert batch is not None
    sampled = bench.world.run(batch)
    assert bench.scheduler.abort("a")
    assert bench.pool.num_free == 97
    assert bench.scheduler.update(batch, sampled) == []
    assert bench.pool.num_free == 100
    assert request.output_token_ids == []


def test_the_next_prefixes_are_those_of_the_first_and_of_who_could_begin_with_it() -> None:
    bench = Bench(num_blocks=12)
    running = bench.add("r", 4)
    assert bench.scheduler.next_prefixes(4) == [running.block_hashes]
    batch = bench.scheduler.schedule()
    assert batch is not None
    late, logprobs = bench.add("b", 8, arrival_s=2.0), bench.add("l", 4, arrival_s=3.0, prompt_logprobs=1)
    first, reserving = bench.add("a", 8, arrival_s=1.0), bench.reserve("d", 8, arrival_s=4.0)
    assert bench.scheduler.next_prefixes(4) == [], "in mid-step"
    bench.finish_step(batch)
    # Of 11 free blocks one is the running request's next one; the four want 2, 2, 1 and 2, and one more each.
    assert logprobs.wants_prompt_logprobs
    assert bench.scheduler.next_prefixes(4) == [first.block_hashes, late.block_hashes]
    assert bench.scheduler.next_prefixes(1) == [first.block_hashes]
    bench.scheduler.abort("l")
    assert bench.scheduler.next_prefixes(4) == [each.block_hashes for each in (first, late, reserving)]
    taken = bench.scheduler.take_prefix(hash_blocks(namespace("ab"), [9] * 36, BLOCK_SIZE))
    assert taken is not None
    assert bench.scheduler.next_prefixes(4) == [first.block_hashes], "the others' might cost it its own"


def test_there_is_no_next_prefix_without_a_place_in_the_batch() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("a", 4)
    bench.step()
    bench.add("b", 4)
    assert bench.scheduler.next_prefixes(4) == []
