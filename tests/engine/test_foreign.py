"""The books that an engine of another project's needs beside it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.block import BlockHash, HostMemory, ProofKey, subject_of
from kvstore.protocol import Reservation
from services.engine.config import EngineConfig
from services.engine.foreign import Arrivals, Live, Place, ProofBook, Turns, model_fingerprint, said_of
from services.engine.request import Request, SamplingParams

HASHES = [BlockHash(bytes([number]) * 16) for number in range(1, 5)]


def live(number: int, place: Place, priority: int = 0) -> Live:
    request = Request(f"r{number}", (1, 2, 3), SamplingParams(), priority=priority, arrival_s=number)
    return Live.of(request, number, place, "model", 16, shares=True)


def test_reservations_and_the_queue_are_one_order() -> None:
    turns, granted = Turns(), list[Reservation]()
    first, reserving, late, urgent = (
        live(1, Place.BEHIND),
        live(2, Place.RESERVING),
        live(3, Place.BEHIND),
        live(4, Place.BEHIND, priority=-1),
    )
    for each in (late, first, urgent):
        turns.add(each)
    turns.reserve(reserving, granted.append)
    assert list(turns.take_free()) == [urgent, first]
    assert (len(turns), turns.num_waiting_tokens, turns.next_reservation) == (2, 3, reserving)
    turns.grant()(Reservation([7], 0))
    assert granted == [Reservation([7], 0)]
    assert list(turns.take_free()) == [late]
    assert (len(turns), turns.next_reservation) == (0, None)


@pytest.mark.parametrize("place", [Place.BEHIND, Place.RESERVING])
def test_who_leaves_holds_up_nobody(place: Place) -> None:
    turns, gone, other = Turns(), live(1, place), live(2, Place.BEHIND)
    turns.add(other)
    if place is Place.RESERVING:
        turns.reserve(gone, lambda room: None)
    else:
        turns.add(gone)
    turns.leave(gone)
    assert list(turns.take_free()) == [other]


def book() -> tuple[ProofBook, HostMemory, dict[int, BlockHash]]:
    memory, hashes = HostMemory(np.random.default_rng(0).integers(0, 256, (4, 64), np.uint8)), dict[int, BlockHash]()
    return ProofBook(memory, ProofKey.public(), hashes.get), memory, hashes


def test_a_proof_counts_while_the_block_has_the_hash_that_it_was_made_for() -> None:
    proofs, memory, hashes = book()
    hashes[1] = HASHES[0]
    proofs.prove([0, 1])  # block 0 cannot be found: nobody will ask for it
    kept = proofs.proofs([1], [subject_of(HASHES[0])])
    memory.view(1)[0] ^= 1
    assert proofs.proofs([1], [subject_of(HASHES[0])]) == kept
    assert proofs.find_wrong([0, 1]) == [1]
    hashes[1] = HASHES[1]  # evicted, and something else in it
    assert proofs.find_wrong([1]) == []
    assert proofs.proofs([1], [subject_of(HASHES[0])]) != kept


def test_a_block_that_is_filled_again_under_the_same_hash_is_proven_again() -> None:
    """Evicted, then computed in another batch: the same tokens, and perhaps other last bits."""
    proofs, memory, hashes = book()
    hashes[1] = HASHES[0]
    proofs.prove([1])
    del hashes[1]
    memory.view(1)[0] ^= 1
    hashes[1] = HASHES[0]
    proofs.prove([1])
    assert proofs.find_wrong([1]) == []
    assert proofs.proofs([1], [subject_of(HASHES[0])]) == ProofKey.public().prove(memory, [1], [subject_of(HASHES[0])])


def test_a_block_is_proven_anew_for_another_subject() -> None:
    proofs, memory, hashes = book()
    hashes[2] = HASHES[2]
    proofs.keep(2, HASHES[2], ProofKey.public().prove(memory, [2], [subject_of(HASHES[2])])[0])
    own, others = proofs.proofs([2, 2], [subject_of(HASHES[2]), subject_of(None, b"a transfer's id.", 0)])
    assert own != others
    assert proofs.find_wrong([2]) == []


def test_a_model_is_told_apart_by_every_byte_and_by_what_is_said_of_it(tmp_path: Path) -> None:
    weights, shares = tmp_path / "model.safetensors", list[float]()
    weights.write_bytes(bytes(range(250)))

    def fingerprint(config: dict[str, object], said: list[str]) -> str:
        return model_fingerprint([weights], config, said, shares.append)

    first = fingerprint({"hidden_size": 4, "_name_or_path": "here"}, ["bfloat16"])
    assert (len(first), shares[-1]) == (32, 1.0)
    assert fingerprint({"hidden_size": 4, "_name_or_path": "there"}, ["bfloat16"]) == first
    assert fingerprint({"hidden_size": 8}, ["bfloat16"]) != first
    assert fingerprint({"hidden_size": 4}, ["float32"]) != first
    weights.write_bytes(bytes(range(249)) + b"\0")
    assert fingerprint({"hidden_size": 4}, ["bfloat16"]) != first


LONG_ROPE = {"rope_type": "longrope", "long_factor": [4.0], "short_factor": [1.0]}


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 4096},
        {"rope_scaling": {"type": "su", "original_max_position_embeddings": 4096}},
        {"text_config": {"rope_parameters": {"full_attention": LONG_ROPE}}, "original_max_position_embeddings": 4096},
    ],
)
def test_with_long_rope_a_longer_context_makes_other_blocks(config: dict[str, object]) -> None:
    def said(max_model_len: int) -> list[object]:
        return said_of(config, "bfloat16", max_model_len, EngineConfig("m", engine="vllm"))

    assert said(2048) == said(4096) != said(4097) == said(131072)


def test_other_ropes_have_the_same_blocks_in_contexts_of_any_length() -> None:
    config = {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 4096}}
    assert said_of(config, "bfloat16", 1, EngineConfig("m")) == said_of(config, "bfloat16", 131072, EngineConfig("m"))


def test_a_model_that_is_quantized_as_it_is_loaded_is_another_one() -> None:
    plain, quantized = EngineConfig("m", engine="vllm"), EngineConfig("m", engine="vllm", quantization="fp8")
    assert said_of({}, "bfloat16", 8, plain) != said_of({}, "bfloat16", 8, quantized)
    awq = {"quantization_config": {"quant_method": "awq"}}  # which the configuration says of all
    by_name = EngineConfig("m", engine="vllm", quantization="awq")
    assert said_of(awq, "bfloat16", 8, plain) == said_of(awq, "bfloat16", 8, by_name)


def test_flags_that_change_what_is_in_blocks_make_another_model() -> None:
    plain = EngineConfig("m", engine="vllm")
    others = [EngineConfig("m", engine="vllm", kv_cache_dtype=dtype) for dtype in ("fp8", "fp8_e5m2")]
    others.append(EngineConfig("m", engine="vllm", engine_args="--hf-overrides '{}'"))
    said = [said_of({}, "bfloat16", 8, each) for each in (plain, *others)]
    assert all(one != other for one, other in itertools.combinations(said, 2))


def test_what_nobody_has_proven_is_wiped_and_what_is_proven_all_ranks_have() -> None:
    # Four ranks: the first two have the same heads, and so have the others.
    caches = [torch.full((3, 8, 16), rank, dtype=torch.uint8) for rank in range(4)]
    arrivals = Arrivals(caches, 2)
    arrivals.expect([1, 2, 3])
    arrivals.accept([2, 5])
    assert [cache[0, 2].unique().tolist() for cache in caches] == [[0], [0], [2], [2]]
    assert [cache[0, 5].unique().tolist() for cache in caches] == [[0], [0], [2], [2]]
    arrivals.give_up([2, 3, 4])
    arrivals.give_up([3])
    for block_id in range(8):
        assert caches[2][:, block_id].unique().tolist() == [0 if block_id == 3 else 2], block_id
