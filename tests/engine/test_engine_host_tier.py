"""An engine whose small paged cache evicts into main memory: the tokens of transformers, and less is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvstore.block import BlockHash, ProofKey
from kvstore.protocol import Reservation
from services.engine.api import SamplingParams
from services.engine.config import EngineConfig
from services.engine.native import Engine
from services.engine.native.memory import capacity
from services.engine.native.memory.capacity import choose_num_host_slots
from services.engine.native.memory.host_copies import open_host_tier
from services.engine.native.memory.kv_memory import as_bytes
from services.engine.native.scheduling import Request
from services.engine.tensor_memory import DeviceMemory
from services.settings import SettingsError
from tests.hf_models import random_prompts, reference_greedy, write_model

NUM_OUTPUTS = 12
NUM_BLOCKS = 25  # of 16 tokens: one request of full length, and no second one beside it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("model") / "llama3", "llama3", seed=3)


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    yield from make_engine(model)


def make_engine(model: Path, num_blocks: int = NUM_BLOCKS, size_gib: float = 0.01) -> Iterator[Engine]:
    config = EngineConfig(
        model=str(model),
        device="cpu",
        block_size=16,
        max_model_len=400,
        num_gpu_blocks_override=num_blocks,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        kv_offloading_size=size_gib,
    )
    engine = Engine.from_config(config)
    yield engine
    engine.check_integrity()


def serve(engine: Engine, prompt: list[int], name: str = "r", **sampling: object) -> Request:
    settings: dict[str, object] = {"temperature": 0.0, "max_tokens": NUM_OUTPUTS, "ignore_eos": True, **sampling}
    request = Request(name, prompt, SamplingParams(**settings))  # type: ignore[arg-type]
    engine.add_request(request)
    run(engine)
    return request


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.check_integrity()


def evict(engine: Engine) -> None:
    """Let a prompt take all the pool's blocks."""
    serve(engine, random_prompts([387], seed=99)[0], "evictor")


def flip_byte(engine: Engine, block_hash: BlockHash) -> None:
    assert engine.host_tier is not None
    (pinned,) = engine.host_tier.pin([block_hash])
    engine.host_tier._memory.view(pinned.slot)[1000] ^= 4
    engine.host_tier.unpin([pinned])


def test_an_evicted_prefix_comes_back_before_the_prompt_is_queued(model: Path, engine: Engine) -> None:
    shared, tails = random_prompts([320], seed=1)[0], random_prompts([9, 9], seed=2)
    expected = reference_greedy(model, [shared + tail for tail in tails], NUM_OUTPUTS, ignore_eos=True)
    first = serve(engine, shared + tails[0], "first")
    assert first.output_token_ids == expected[0]
    hashes = first.block_hashes[:20]
    evict(engine)
    assert engine.pool.peek_prefix(hashes) < 20
    assert engine.host_tier is not None
    restore = engine.begin_restore(hashes)
    assert restore is not None
    engine.check_integrity()
    restore.copy_back()
    copied = restore.end()
    assert all(copied.is_whole)
    assert engine.pool.peek_prefix(hashes) == 20
    assert engine.pool.proofs(restore.missing_ids) == [block.proof for block in restore.pinned]
    second = serve(engine, shared + tails[1], "second")
    assert (second.output_token_ids, second.num_cached_tokens) == (expected[1], 320)


def test_what_a_queued_prompt_lacks_comes_back_when_its_turn_is_near(model: Path, engine: Engine) -> None:
    prompt = random_prompts([330], seed=3)[0]
    (expected,) = reference_greedy(model, [prompt], NUM_OUTPUTS, ignore_eos=True)
    serve(engine, prompt, "first")
    for _ in range(3):
        evict(engine)
        again = serve(engine, prompt, "again")
        assert (again.output_token_ids, again.num_cached_tokens) == (expected, 320)


def test_a_reservation_finds_what_comes_back(model: Path, engine: Engine) -> None:
    prompt = random_prompts([330], seed=4)[0]
    serve(engine, prompt, "first")
    evict(engine)
    granted: list[Reservation] = []
    request = Request("reserved", prompt, SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUTS))
    engine.reserve(request, granted.append)
    (reservation,) = granted
    assert (reservation.num_present, len(reservation.block_ids)) == (20, 21)
    engine.release_reservation(request, reservation.block_ids)


def test_preempted_requests_get_their_blocks_back_and_compute_less(model: Path) -> None:
    prompts = random_prompts([60, 70, 80, 90, 100, 110], seed=5)
    expected = reference_greedy(model, prompts, 120, ignore_eos=True)
    num_computed = []
    for size_gib in (0.01, 0.0):
        for engine in make_engine(model, num_blocks=30, size_gib=size_gib):
            requests = [
                Request(f"r{i}", prompt, SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True))
                for i, prompt in enumerate(prompts)
            ]
            for request in requests:
                engine.add_request(request)
            while engine.has_work:
                engine.step()
                engine.check_integrity()
            assert [request.output_token_ids for request in requests] == expected
            assert engine.stats.num_preemptions > 0
            num_computed.append(engine.stats.num_prompt_tokens)
    assert num_computed[0] < num_computed[1], "with and without the tier"


@pytest.mark.parametrize("wrong", [0, 7, 19])
def test_a_flipped_byte_costs_a_recomputation_and_no_token(model: Path, engine: Engine, wrong: int) -> None:
    prompt = random_prompts([330], seed=6)[0]
    (expected,) = reference_greedy(model, [prompt], NUM_OUTPUTS, ignore_eos=True)
    first = serve(engine, prompt, "first")
    evict(engine)
    flip_byte(engine, first.block_hashes[wrong])
    again = serve(engine, prompt, "again")
    assert (again.output_token_ids, again.num_cached_tokens) == (expected, wrong * 16)
    assert engine.host_tier is not None
    assert engine.host_tier.stats.num_corrupt == 1


def test_a_restore_without_room_or_that_fails_leaves_everything_as_it_was(engine: Engine) -> None:
    prompt = random_prompts([330], seed=7)[0]
    hashes = serve(engine, prompt, "first").block_hashes[:20]
    evict(engine)
    taken = engine.take_prefix([BlockHash(bytes([i]) * 16) for i in range(NUM_BLOCKS - 10)])
    assert taken is not None
    assert engine.begin_restore(hashes) is None
    engine.check_integrity()
    engine.release_blocks(taken.block_ids)
    restore = engine.begin_restore(hashes)
    assert restore is not None
    restore.end()
    engine.check_integrity()
    assert engine.load().num_lent_blocks == 0
    assert engine.pool.peek_prefix(hashes) == 0


def test_logprobs_of_a_prompt_are_computed_whatever_is_kept(engine: Engine) -> None:
    prompt = random_prompts([200], seed=8)[0]
    serve(engine, prompt, "first")
    evict(engine)
    assert engine.host_tier is not None
    before = engine.host_tier.stats.num_restored
    request = serve(engine, prompt, "logprobs", prompt_logprobs=1)
    assert request.num_cached_tokens == 0
    assert len(request.prompt_logprobs) == 200
    assert engine.host_tier.stats.num_restored == before


def test_a_size_beyond_the_memory_there_is_or_below_one_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "available_memory_bytes", lambda: 10 << 30)
    config = EngineConfig(model="m", kv_offloading_size=4)
    assert choose_num_host_slots(config, 1 << 20, 1 << 30, "cpu") == 4096
    assert choose_num_host_slots(config, 1 << 20, 1 << 40, "cuda") == 4096
    with pytest.raises(SettingsError, match=r"kv_offloading_size: 4 GiB asked for, and 3\.0 GiB"):
        choose_num_host_slots(config, 1 << 20, 7 << 30, "cpu")
    with pytest.raises(SettingsError, match=r"kv_offloading_size: .* hold no KV block"):
        choose_num_host_slots(EngineConfig(model="m", kv_offloading_size=1e-6), 1 << 20, 1, "cpu")
    assert choose_num_host_slots(EngineConfig(model="m"), 1 << 20, 1, "cpu") == 0


def test_the_memory_is_aligned_touched_and_copied_block_by_block() -> None:
    kv_cache = torch.arange(4 * 64, dtype=torch.float32).reshape(4, 64)
    tier = open_host_tier(kv_cache, DeviceMemory(as_bytes(kv_cache)[None]), 3, ProofKey.public())
    copier = tier._copier
    copier.copy_out([2, 0], [1, 2])
    kv_cache.zero_()
    copier.copy_in([1], [3])
    assert kv_cache[3].tolist() == list(range(128, 192))
    assert not kv_cache[:3].any()
