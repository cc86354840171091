"""The engine with real (tiny, random) models: its tokens are those of transformers, whatever way they were computed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from kvstore.block import subject_of
from kvstore.protocol import Reservation
from services.engine.api import (
    FinishReason,
    InvalidRequest,
    NotLent,
    PositionLogprobs,
    RequestUpdate,
    SampledToken,
    SamplingParams,
)
from services.engine.config import EngineConfig
from services.engine.native import Engine
from services.engine.native.memory import capacity
from services.engine.native.memory.capacity import choose_num_blocks
from services.engine.native.model.model import load_model
from services.engine.native.scheduling import Request
from services.engine.native.scheduling.request import RequestStatus
from services.engine.native.scheduling.scheduler import NotReserved
from services.lifecycle import Event, Timeline
from services.settings import SettingsError
from tests.hf_models import EOS_TOKEN_IDS, VOCAB_SIZE, random_prompts, reference_greedy, reference_logits, write_model

NUM_OUTPUTS = 12
TRANSFER = b"a transfer's id."
LENGTHS = (1, 15, 16, 17, 64, 130, 300)

# Family to directory of its model, written once.
Models = Callable[[str], Path]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    @lru_cache
    def write(family: str) -> Path:
        return write_model(tmp_path_factory.mktemp("models") / family, family, seed=3)

    return write


def make_engine(directory: Path, **settings: object) -> Engine:
    defaults: dict[str, object] = {
        "device": "cpu",
        "block_size": 16,
        "max_model_len": 400,
        "num_gpu_blocks_override": 128,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
    }
    return Engine.from_config(EngineConfig(model=str(directory), **{**defaults, **settings}))  # type: ignore[arg-type]


def make_requests(prompts: Sequence[Sequence[int]], *, name: str = "r", **sampling: object) -> list[Request]:
    defaults: dict[str, object] = {"temperature": 0.0, "max_tokens": NUM_OUTPUTS, "ignore_eos": True}
    return [
        Request(f"{name}{i}", prompt, SamplingParams(**{"seed": i, **defaults, **sampling}))  # type: ignore[arg-type]
        for i, prompt in enumerate(prompts)
    ]


def run(engine: Engine, requests: Sequence[Request]) -> list[RequestUpdate]:
    """Add and run to the end; the pool is whole after each step and empty after the last."""
    for request in requests:
        engine.add_request(request)
    return run_on(engine)


def run_on(engine: Engine) -> list[RequestUpdate]:
    updates: list[RequestUpdate] = []
    while engine.has_work:
        updates += engine.step().updates
        engine.check_integrity()
    return updates


def outputs(requests: Sequence[Request]) -> list[list[int]]:
    return [request.output_token_ids for request in requests]


# ---- the tokens of transformers ---------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_transformers_for_every_chunk_size(models: Models, family: str) -> None:
    prompts = random_prompts(LENGTHS)
    expected = reference_greedy(models(family), prompts, NUM_OUTPUTS, ignore_eos=True)
    for max_num_batched_tokens in (16, 64, 512):
        engine = make_engine(models(family), max_num_batched_tokens=max_num_batched_tokens)
        requests = make_requests(prompts)
        run(engine, requests)
        assert outputs(requests) == expected
        assert engine.pool.num_free == engine.pool.num_blocks


def test_the_end_of_sequence_token_ends_a_request_as_it_does_there(models: Models) -> None:
    prompts = random_prompts([5] * 12, seed=5)
    # Bias towards the end-of-sequence token, or no request would meet it.
    requests = make_requests(prompts, ignore_eos=False, max_tokens=40, logit_bias={EOS_TOKEN_IDS[0]: 6.0})
    run(make_engine(models("qwen2")), requests)
    ended = [request for request in requests if request.finish_reason is FinishReason.STOP]
    assert ended
    for request in ended:
        assert request.output_token_ids[-1] in EOS_TOKEN_IDS
        assert not set(request.output_token_ids[:-1]) & set(EOS_TOKEN_IDS)


def test_preempted_requests_continue_with_the_same_tokens(models: Models) -> None:
    prompts = random_prompts([30, 40, 50, 60], seed=1)
    expected = reference_greedy(models("llama3"), prompts, 40, ignore_eos=True)
    engine = make_engine(models("llama3"), num_gpu_blocks_override=14, max_model_len=200)
    requests = make_requests(prompts, max_tokens=40)
    run(engine, requests)
    assert engine.stats.num_preemptions > 0
    assert outputs(requests) == expected


def test_prefix_hits_change_nothing_but_the_work(models: Models) -> None:
    shared = random_prompts([100], seed=2)[0]
    prompts = [shared[:96], shared[:96], shared, [*shared, 5, 6], [*shared[:50], 9, 9, 9]]
    expected = reference_greedy(models("qwen2"), prompts, NUM_OUTPUTS, ignore_eos=True)
    engine = make_engine(models("qwen2"))
    for i, prompt in enumerate(prompts):
        (request,) = make_requests([prompt], name=f"turn{i}-")
        run(engine, [request])
        assert request.output_token_ids == expected[i]
    assert engine.stats.num_prefix_hits == 95 + 96 + 96 + (48 + 2)
    without = make_engine(models("qwen2"), enable_prefix_caching=False)
    run(without, make_requests(prompts))
    assert without.stats.num_prefix_hits == 0


@pytest.mark.parametrize("max_num_batched_tokens", [16, 40, 512])
@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_prefixes_of_every_length_are_reused_to_the_token(
    models: Models, family: str, max_num_batched_tokens: int
) -> None:
    """Mistral's window is shorter than some of the prompts."""
    block_size = 16
    base = random_prompts([5 * block_size], seed=11)[0]
    tails = random_prompts([1 + length % 20 for length in range(3 * block_size + 1)], seed=12)
    # The token after the shared ones is another one, so that exactly `length` are shared.
    prompts = [
        [*base[:length], (base[length] + 1) % VOCAB_SIZE, *tails[length]] for length in range(1, 3 * block_size + 1)
    ]
    expected = reference_greedy(models(family), prompts, 4, ignore_eos=True)
    engine = make_engine(models(family), max_num_batched_tokens=max_num_batched_tokens)
    requests = make_requests(prompts, max_tokens=4)
    for number, request in enumerate(requests):
        # Nothing but "base" is there to be copied from.
        engine.pool.drop(range(engine.pool.num_blocks))
        run(engine, make_requests([base], name=f"base{number}-", max_tokens=1))
        run(engine, [request])
    assert outputs(requests) == expected
    assert [request.num_cached_tokens for request in requests] == list(range(1, 3 * block_size + 1))


def test_requests_that_copy_from_each_other_in_one_batch_have_their_own_tokens(models: Models) -> None:
    rng = random.Random(7)
    base = random_prompts([90], seed=13)[0]
    prompts = [base]
    for tail in random_prompts([rng.randint(1, 40) for _ in range(60)], seed=14):
        before = rng.choice(prompts)
        prompts.append([*before[: rng.randint(1, min(len(before), 90))], *tail])
    expected = reference_greedy(models("llama3"), prompts, NUM_OUTPUTS, ignore_eos=True)
    engine = make_engine(models("llama3"), num_gpu_blocks_override=40)
    requests = make_requests(prompts)
    run(engine, requests)
    assert outputs(requests) == expected
    assert engine.stats.num_partial_hit_tokens > 200
    assert engine.stats.num_prefix_hits == sum(request.num_cached_tokens for request in requests)
    assert engine.stats.num_prefix_queries == sum(len(prompt) for prompt in prompts)
    assert engine.pool.num_free == engine.pool.num_blocks


def test_what_a_copied_block_goes_on_with_reaches_nobody_else(models: Models) -> None:
    """Were it not a number, attention's zero weight would not make it vanish."""
    base = random_prompts([30], seed=15)[0]
    prompt = [*base[:20], 9, 9]
    engine = make_engine(models("llama3"))
    other = Request("other", [*base, *base], SamplingParams(temperature=0.0), hold_blocks=True, transfer_id=TRANSFER)
    run(engine, [other])
    engine.kv_cache[other.block_table[1], ..., 20 - 16 :, :] = math.nan
    (request,) = make_requests([prompt])
    run(engine, [request])
    assert request.num_cached_tokens == 20
    assert [request.output_token_ids] == reference_greedy(models("llama3"), [prompt], NUM_OUTPUTS, ignore_eos=True)


def test_generated_tokens_are_found_by_the_next_turn(models: Models) -> None:
    engine = make_engine(models("qwen2"))
    (first,) = make_requests(random_prompts([40]), max_tokens=30)
    run(engine, [first])
    next_turn = [*first.token_ids, 7, 8]
    (second,) = make_requests([next_turn], name="second")
    run(engine, [second])
    assert second.num_cached_tokens == 64
    assert [second.output_token_ids] == reference_greedy(models("qwen2"), [next_turn], NUM_OUTPUTS, ignore_eos=True)


def test_a_pool_full_of_garbage_harms_nobody(models: Models) -> None:
    prompts = random_prompts([1, 17, 130])
    engine = make_engine(models("llama3"))
    engine.kv_cache.fill_(math.nan)
    requests = make_requests(prompts)
    run(engine, requests)
    assert outputs(requests) == reference_greedy(models("llama3"), prompts, NUM_OUTPUTS, ignore_eos=True)


def test_garbage_in_a_block_that_is_nobodys_harms_no_batch_of_several_lengths(models: Models) -> None:
    prompts = random_prompts([5, 20, 40, 70])
    engine = make_engine(models("llama3"), max_num_batched_tokens=256)
    held = engine.pool.allocate(1)
    assert held == [0], "the id with which tables of blocks are filled up"
    engine.kv_cache[held] = math.nan
    requests = make_requests(prompts)
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        engine.step()
    assert outputs(requests) == reference_greedy(models("llama3"), prompts, NUM_OUTPUTS, ignore_eos=True)


# ---- drawn tokens -------------------------------------------------------------------------


def test_a_seed_gives_the_same_stream_whatever_the_batching(models: Models) -> None:
    prompts = random_prompts([3, 20, 33, 80, 120], seed=4)
    settings: list[dict[str, object]] = [
        {"max_num_batched_tokens": 512},
        {"max_num_batched_tokens": 16},
        {"max_num_seqs": 1},
        {"num_gpu_blocks_override": 13, "max_model_len": 200},
    ]
    streams = []
    for chosen in settings:
        requests = make_requests(prompts, temperature=0.8, top_p=0.95, max_tokens=25, presence_penalty=0.3)
        run(make_engine(models("llama3"), **chosen), requests)
        streams.append(outputs(requests))
    assert all(stream == streams[0] for stream in streams)
    others = make_requests(prompts, temperature=0.8, top_p=0.95, max_tokens=25, presence_penalty=0.3, seed=77)
    run(make_engine(models("llama3")), others)
    assert outputs(others) != streams[0]


# ---- handoff --------------------------------------------------------------------------------


def hand_off(prefill: Engine, decode: Engine, request: Request) -> Request:
    """Prefill in one engine, copy the blocks, go on in the other. Returns the request that goes on."""
    source = Request(
        request.request_id, request.prompt_token_ids, request.sampling, hold_blocks=True, transfer_id=TRANSFER
    )
    updates = run(prefill, [source])
    blocks, last = [block for update in updates for block in update.blocks], updates[-1]
    assert last.finish_reason is FinishReason.HANDED_OFF
    granted: list[Reservation] = []
    decode.reserve(request, granted.append)
    (reservation,) = granted
    for index in range(reservation.num_present, len(reservation.block_ids)):
        decode.kv_cache[reservation.block_ids[index]] = prefill.kv_cache[source.block_table[index]]
    subjects = [subject_of(block.block_hash, TRANSFER, index) for index, block in enumerate(blocks)]
    proofs = [block.proof for block in blocks]
    assert proofs == prefill.proof_key.prove(prefill.memory, source.block_table, subjects), "as the blocks were made"
    prefill.release_blocks(source.block_table)
    update = decode.add_prefilled(request, reservation.block_ids, proofs, last.new_tokens[0])
    assert (update.new_tokens, update.finish_reason) == (last.new_tokens, None)
    prefill.check_integrity()
    decode.check_integrity()
    return request


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "repetition_penalty": 1.1}], ids=["greedy", "drawn"])
def test_prefilled_elsewhere_gives_the_tokens_of_one_engine(models: Models, sampling: dict[str, object]) -> None:
    prompts = random_prompts([1, 16, 40, 100], seed=6)
    alone = make_requests(prompts, max_tokens=30, **sampling)
    run(make_engine(models("qwen3")), alone)
    prefill, decode = make_engine(models("qwen3")), make_engine(models("qwen3"), num_gpu_blocks_override=64)
    joined = [hand_off(prefill, decode, request) for request in make_requests(prompts, max_tokens=30, **sampling)]
    run_on(decode)
    assert outputs(joined) == outputs(alone)
    for engine in (prefill, decode):
        assert engine.pool.num_free == engine.pool.num_blocks


def test_a_second_handoff_of_the_same_prefix_reads_only_the_rest(models: Models) -> None:
    prefill, decode = make_engine(models("qwen2")), make_engine(models("qwen2"))
    first, second = make_requests(random_prompts([70]) * 2)
    hand_off(prefill, decode, first)
    run_on(decode)
    granted: list[Reservation] = []
    decode.reserve(second, granted.append)
    assert (granted[0].num_present, len(granted[0].block_ids)) == (4, 5)
    decode.release_reservation(second, granted[0].block_ids)
    hand_off(prefill, decode, second)
    run_on(decode)
    assert first.output_token_ids == second.output_token_ids


def test_a_joined_request_that_is_preempted_prefills_here_and_goes_on(models: Models) -> None:
    prompts = random_prompts([50, 50], seed=7)
    expected = reference_greedy(models("qwen2"), prompts, 60, ignore_eos=True)
    prefill = make_engine(models("qwen2"))
    decode = make_engine(models("qwen2"), num_gpu_blocks_override=10, max_model_len=150)
    requests = [hand_off(prefill, decode, request) for request in make_requests(prompts, max_tokens=60)]
    run_on(decode)
    assert [request.num_preemptions for request in requests] == [0, 1]
    assert outputs(requests) == expected


def test_a_prompt_that_is_preempted_lends_each_of_its_blocks_once(models: Models) -> None:
    engine = make_engine(models("qwen2"), num_gpu_blocks_override=42, max_num_batched_tokens=16)
    others = make_requests(random_prompts([79, 79, 79], seed=9), max_tokens=60)
    for request in others:
        engine.add_request(request)
    while any(not request.output_token_ids for request in others):
        engine.step()
    held = Request(
        "held",
        random_prompts([330])[0],
        SamplingParams(temperature=0.0),
        arrival_s=1.0,
        hold_blocks=True,
        transfer_id=TRANSFER,
    )
    updates = [update for update in run(engine, [held]) if update.request is held]
    assert updates[-1].num_preemptions > 0
    blocks = [block for update in updates for block in update.blocks]
    assert [block.block_hash for block in blocks] == [*held.block_hashes[:20], None]
    engine.release_blocks([block.block_id for block in blocks])
    engine.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks


def test_a_reservation_waits_without_keeping_the_engine_busy(models: Models) -> None:
    engine = make_engine(models("qwen2"), num_gpu_blocks_override=8, max_model_len=128)
    held = Request(
        "held", random_prompts([100])[0], SamplingParams(temperature=0.0), hold_blocks=True, transfer_id=TRANSFER
    )
    run(engine, [held])
    granted: list[Reservation] = []
    first, second = make_requests(random_prompts([60, 60], seed=8))
    engine.reserve(first, granted.append)
    engine.add_request(second)
    assert engine.step().updates == ()
    assert not engine.has_work
    assert granted == []
    engine.release_blocks(held.block_table)
    assert len(granted) == 1
    engine.release_reservation(first, granted[0].block_ids)
    assert engine.has_work
    run_on(engine)
    assert second.is_finished


def test_the_ends_of_a_reservation(models: Models) -> None:
    engine = make_engine(models("qwen2"), max_num_seqs=1)
    granted: list[Reservation] = []
    first, second, third = make_requests(random_prompts([20, 20, 20]))
    for request in (first, second, third):
        engine.reserve(request, granted.append)
    assert len(granted) == 1
    assert engine.cancel_reservation(second)
    assert not engine.cancel_reservation(first)
    assert engine.abort(third.request_id)
    assert engine.abort(first.request_id)
    with pytest.raises(NotReserved):
        engine.add_prefilled(first, granted[0].block_ids, [1, 2], SampledToken(3))
    engine.release_reservation(first, granted[0].block_ids)
    with pytest.raises(NotLent):
        engine.release_reservation(first, granted[0].block_ids)
    assert len(granted) == 1
    assert [request.status for request in (first, second, third)] == [
        RequestStatus.FINISHED,
        RequestStatus.NEW,
        RequestStatus.FINISHED,
    ]
    engine.check_integrity()
    assert engine.load().num_lent_blocks == engine.load().num_waiting == 0


# ---- logprobs -----------------------------------------------------------------------------


def assert_close(positions: Sequence[PositionLogprobs | None], logits: torch.Tensor, token_ids: Sequence[int]) -> None:
    expected = logits.double().log_softmax(-1)
    for position, row, token_id in zip(positions, expected, token_ids, strict=True):
        assert position is not None
        assert position.chosen is not None
        assert position.chosen.token_id == token_id
        assert position.chosen.logprob == pytest.approx(row[token_id].item(), abs=2e-4)
        assert position.chosen.rank == 1 + int((row > row[token_id]).sum())
        assert [top.token_id for top in position.top] == row.topk(len(position.top)).indices.tolist()


@pytest.mark.parametrize("max_num_batched_tokens", [16, 512])
def test_logprobs_of_prompt_and_output_are_those_of_transformers(models: Models, max_num_batched_tokens: int) -> None:
    engine = make_engine(models("qwen2"), max_num_batched_tokens=max_num_batched_tokens)
    prompts = random_prompts([1, 40, 300], seed=9)
    run(engine, make_requests(prompts, name="cached"))
    requests = make_requests(prompts, logprobs=3, prompt_logprobs=2, temperature=0.7, max_tokens=4)
    updates = run(engine, requests)
    for request in requests:
        own = [update for update in updates if update.request is request]
        logits = reference_logits(models("qwen2"), request.token_ids[:-1])
        reports = [update for update in own if update.prompt_logprobs is not None]
        assert [update.new_tokens != () for update in reports] == [True]
        told = reports[0].prompt_logprobs
        assert told is not None
        assert told[0] is None
        num_prompt_tokens = request.num_prompt_tokens
        assert_close(told[1:], logits[: num_prompt_tokens - 1], request.prompt_token_ids[1:])
        generated = [token.logprobs for update in own for token in update.new_tokens]
        assert_close(generated, logits[num_prompt_tokens - 1 :], request.output_token_ids)
        assert {len(position.top) for position in generated if position is not None} == {3}
        assert request.num_cached_tokens == 0


# ---- what is refused, counted and marked -----------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ([], {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt"),
        ([3, -1], {}, "prompt"),
        ([3] * 400, {}, "prompt"),
        ([3], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ([3], {"allowed_token_ids": (VOCAB_SIZE,)}, "allowed_token_ids"),
        ([3], {"stop_token_ids": (VOCAB_SIZE,)}, "stop_token_ids"),
        ([3], {"allowed_token_ids": EOS_TOKEN_IDS, "min_tokens": 1, "ignore_eos": False}, "allowed_token_ids"),
        ([3], {"stop_token_ids": tuple(range(VOCAB_SIZE)), "min_tokens": 1}, "stop_token_ids"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_door(
    models: Models, prompt: list[int], sampling: dict[str, object], param: str
) -> None:
    engine = make_engine(models("qwen2"))
    for enter in (engine.add_request, lambda request: engine.reserve(request, lambda _: None)):
        (request,) = make_requests([prompt], **sampling)
        with pytest.raises(InvalidRequest) as caught:
            enter(request)
        assert caught.value.param == param
    assert not engine.has_work
    assert engine.load().num_waiting == 0


def test_a_broken_model_ends_its_requests_with_an_error(models: Models) -> None:
    engine = make_engine(models("qwen2"))
    (healthy, broken) = make_requests(random_prompts([5, 5]), max_tokens=5)
    run_later = [healthy, broken]
    for request in run_later:
        engine.add_request(request)
    engine.step()
    engine.kv_cache[broken.block_table[0]] = math.nan
    updates = run_on(engine)
    assert broken.finish_reason is FinishReason.ERROR
    assert healthy.finish_reason is FinishReason.LENGTH
    (failed,) = [update for update in updates if update.finish_reason is FinishReason.ERROR]
    assert failed.failure is not None
    assert "not finite" in failed.failure


def test_load_and_timeline_tell_where_a_request_is(models: Models) -> None:
    ticks = iter(range(1000))
    engine = make_engine(models("qwen2"), max_num_batched_tokens=32)
    (request,) = make_requests(random_prompts([50]), max_tokens=2)
    request.timeline = Timeline(lambda: float(next(ticks)))
    engine.add_request(request)
    assert (engine.load().num_waiting, engine.load().num_waiting_tokens) == (1, 50)
    engine.step()
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (1, 0, 18)
    assert (load.num_free_blocks, load.num_blocks) == (124, 128)
    run_on(engine)
    assert list(request.timeline.unix_s) == [
        Event.PREFILL_QUEUED,
        Event.PREFILL_SCHEDULED,
        Event.PREFILL_FINISHED,
        Event.DECODE_JOINED,
    ]
    assert (engine.stats.num_steps, engine.stats.num_prompt_tokens, engine.stats.num_generated_tokens) == (3, 50, 2)
    assert engine.load().num_running == 0


# ---- capacity -------------------------------------------------------------------------------


def test_the_pool_has_the_size_that_the_settings_say() -> None:
    block_bytes = 1 << 20
    assert choose_num_blocks(EngineConfig("m", num_gpu_blocks_override=70), block_bytes, 2048, "cpu") == 70
    assert choose_num_blocks(EngineConfig("m", kv_cache_memory_bytes=100 << 20), block_bytes, 2048, "cpu") == 100


def test_a_pool_too_small_for_one_full_request_is_refused_with_the_numbers() -> None:
    with pytest.raises(SettingsError, match=r"2048 tokens .* needs 64 KV blocks .*-override 63 holds 63"):
        choose_num_blocks(EngineConfig("m", num_gpu_blocks_override=63), 4096, 2048, "cpu")


def test_the_default_is_a_share_of_the_free_memory_and_no_more_than_useful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_memory_bytes", lambda: 10 << 30)
    config = EngineConfig("m", max_num_seqs=8)
    assert choose_num_blocks(config, 4 << 20, 2048, "cpu") == 512
    assert choose_num_blocks(config, 1 << 10, 2048, "cpu") == 2 * 8 * 64


def test_a_loaded_model_can_be_given_to_an_engine(models: Models) -> None:
    model = load_model(str(models("qwen2")), max_model_len=128)
    engine = Engine(model, EngineConfig(str(models("qwen2"))), num_blocks=8)
    assert (engine.layout.block_size, engine.memory.num_blocks, engine.capabilities.max_model_len) == (32, 8, 128)
