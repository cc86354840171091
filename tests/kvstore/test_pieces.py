"""Blocks in pieces are those that they are in one: the same bytes, sums and proofs, and none read from elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import (
    ROW_WORDS,
    BlockHash,
    Geometry,
    HostMemory,
    Multipliers,
    PieceMemory,
    Region,
    checksums,
    row_sums,
    subject_of,
)
from kvstore.block.row_sums import sums_by_numpy
from tests.pieces import piece_memory, read_all, write_all
from tests.proofs import KEY

MULTIPLIERS = Multipliers.of(b"a key")


def random_blocks(num_blocks: int, block_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_blocks, block_bytes), np.uint8)


# ---- bytes, sums and proofs ----


@pytest.mark.parametrize("has_gaps", [False, True])
@pytest.mark.parametrize(
    ("num_pieces", "piece_words", "num_regions"),
    [
        *((1, 40, 1), (2, 1, 1), (3, 299, 1), (24, 2048, 1), (24, 288, 1), (5, 4 * ROW_WORDS, 1)),
        *((3, 9 * ROW_WORDS + 5, 1), (200, 31, 1), (2, 1, 2), (24, 288, 4), (24, 2048, 2), (24, 31, 8)),
    ],
)
def test_a_block_in_pieces_has_the_bytes_the_proof_and_the_checksum_of_its_bytes_in_one(
    num_pieces: int, piece_words: int, num_regions: int, has_gaps: bool
) -> None:
    block_bytes = 8 * num_pieces * piece_words
    whole = HostMemory(random_blocks(3, block_bytes))
    pieces = piece_memory(num_pieces, 3, block_bytes, has_gaps, num_regions)
    write_all(pieces, whole.array)
    assert (read_all(pieces) == whole.array).all()
    subjects = [subject_of(BlockHash(bytes([i]) * 16)) for i in range(3)]
    proofs = KEY.prove(whole, range(3), subjects)
    assert KEY.prove(pieces, range(3), subjects) == proofs
    assert checksums(pieces, [2, 0]) == checksums(whole, [2, 0])
    for piece in {0, num_pieces // 2, num_pieces - 1}:
        last = pieces.view(1, region=piece % num_regions)[piece // num_regions, -1:]
        last ^= 0x80
        assert KEY.find_wrong(pieces, range(3), subjects, proofs) == [1]
        last ^= 0x80
    assert KEY.find_wrong(pieces, range(3), subjects, proofs) == []


@given(st.integers(1, 40), st.integers(1, 3000), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_sums_go_on_from_one_piece_to_the_next(num_pieces: int, piece_words: int, gap: int, seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 2**64, (num_pieces, piece_words + gap), np.uint64)[:, :piece_words]
    expected = sums_by_numpy(MULTIPLIERS, words.reshape(-1).copy())
    assert MULTIPLIERS.sums(words) == expected
    assert sums_by_numpy(MULTIPLIERS, words) == expected


def test_a_library_that_sums_pieces_wrongly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def sums(multipliers: Multipliers, words: np.ndarray) -> bytes:
        return sums_by_numpy(multipliers, words if words.ndim == 1 else words[::-1])

    monkeypatch.setattr(row_sums, "library_path", lambda: row_sums.Path("_row_sums.so"))
    monkeypatch.setattr(row_sums, "sums_by_c", lambda _: sums)
    assert row_sums._fastest.__wrapped__() is sums_by_numpy


def test_a_memory_in_pieces_is_a_view_of_what_the_engine_has() -> None:
    storage = np.zeros(128 + 3 * 5 * 16, np.uint8)
    memory = PieceMemory(storage[128:].reshape(3, 5, 16))
    memory.view(4)[2] = 9
    assert storage[-16:].tolist() == [9] * 16
    assert storage[:-16].tolist() == [0] * (storage.size - 16)
    region = Region(storage.ctypes.data + 128)
    assert memory.geometry == Geometry((region,), 5, 3, 16, piece_stride=5 * 16, block_stride=16)
    assert (memory.num_blocks, memory.block_bytes, memory.device) == (5, 48, "cpu")
    assert memory.geometry.span_bytes == 3 * 5 * 16


def test_the_regions_of_ranks_are_one_pool_whose_pieces_take_turns_in_them() -> None:
    ranks = [np.zeros((3, 5, 16), np.uint8) for _ in range(2)]
    memory = PieceMemory(*ranks)
    regions = tuple(Region(rank.ctypes.data) for rank in ranks)
    assert memory.geometry == Geometry(regions, 5, 6, 16, piece_stride=5 * 16, block_stride=16)
    memory.scatter(4, np.repeat(np.arange(1, 7, dtype=np.uint8), 16))
    assert [rank[:, 4, 0].tolist() for rank in ranks] == [[1, 3, 5], [2, 4, 6]]
    for unlike in (np.zeros((3, 4, 16), np.uint8), np.zeros((3, 5, 24), np.uint8)[:, :, :16]):
        with pytest.raises(ValueError, match="alike"):
            PieceMemory(ranks[0], unlike)
    with pytest.raises(ValueError, match="regions overlap"):
        PieceMemory(ranks[0], ranks[0])


@pytest.mark.parametrize("num_regions", [1, 3])
def test_blocks_outside_are_refused_and_nothing_is_written(num_regions: int) -> None:
    memory = piece_memory(3, 4, 48, num_regions=num_regions)
    for first, num_blocks in ((-1, 1), (4, 1), (3, 2)):
        for move in (memory.gather, memory.scatter):
            with pytest.raises(IndexError, match="outside this pool of 4"):
                move(first, np.ones(num_blocks * 48, np.uint8))
    for block_id in (-1, 4):
        with pytest.raises(IndexError, match="outside this pool of 4"):
            memory.view(block_id)
        with pytest.raises(IndexError, match="outside this pool of 4"):
            memory.sums([0, block_id], MULTIPLIERS)
    assert not read_all(memory).any()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4, 12), np.uint8),
        np.zeros((3, 0, 8), np.uint8),
        np.zeros((3, 4, 8), np.int8),
        np.zeros((4, 8), np.uint8),
        np.zeros((3, 4, 16), np.uint8)[:, :, ::2],
        np.frombuffer(bytes(96), np.uint8).reshape(3, 4, 8),
        np.zeros((3, 4, 8), np.uint8)[::-1],
        np.lib.stride_tricks.as_strided(np.zeros(96, np.uint8), (3, 4, 16), (16, 16, 1)),
    ],
    ids=["odd size", "no blocks", "signed", "flat", "strided", "read-only", "backwards", "overlapping"],
)
def test_an_array_that_cannot_be_pieces_is_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected|overlap"):
        PieceMemory(array)


@pytest.mark.parametrize(
    "change",
    [
        {"num_blocks": 0},
        {"num_pieces": 0},
        {"piece_bytes": 12},
        {"piece_bytes": -8},
        {"piece_stride": 0},
        {"block_stride": 8},
        {"piece_stride": 64},
        {"num_pieces": 1},
        {"regions": ()},
        {"regions": (Region(-1),)},
        {"regions": (Region(1 << 63),)},
        {"regions": (Region(4096), Region(8192))},
        {"num_blocks": 1 << 62},
    ],
)
def test_a_geometry_whose_pieces_overlap_or_lie_nowhere_is_refused(change: dict[str, Any]) -> None:
    geometry = Geometry((Region(4096),), num_blocks=5, num_pieces=3, piece_bytes=16, piece_stride=80, block_stride=16)
    with pytest.raises(ValueError, match=r"expected|belongs|overlap|so large"):
        dataclasses.replace(geometry, **change)
