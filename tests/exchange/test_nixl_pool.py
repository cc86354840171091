"""What a reader makes of an owner's address: each byte of a block goes to its place, whatever pieces either end has."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import Geometry, HostMemory, Region
from kvstore.errors import TransportError
from kvstore.transport import nixl_pool
from kvstore.transport.nixl_pool import PoolAddress, Prepared, cut, fitting_unit, pool_address, prepare

LAYERS = Geometry((Region(4096),), num_blocks=5, num_pieces=3, piece_bytes=16, piece_stride=80, block_stride=16)
RANKS = dataclasses.replace(LAYERS, regions=(Region(4096, 0), Region(8192, 0), Region(4096, 1)), num_pieces=9)


class Agent:
    """Expands strided descriptors as NIXL does: address and length of each, by index."""

    def prep_xfer_dlist(self, name: str, rows: np.ndarray, kind: str) -> list[tuple[int, int]]:
        assert rows.dtype == np.uint64
        return [(start + i * stride, size) for start, size, _, stride, count in rows.tolist() for i in range(count)]


def prepared(geometry: Geometry, unit_bytes: int) -> Prepared:
    agent: Any = Agent()
    return prepare(agent, "somebody", "DRAM", geometry, unit_bytes)


@st.composite
def geometries(draw: st.DrawFn, num_blocks: int, block_words: int) -> Geometry:
    num_layers = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 12) if block_words % n == 0]))
    num_ranks = draw(st.sampled_from([n for n in (1, 2, 4) if block_words % (n * num_layers) == 0]))
    num_pieces = num_layers * num_ranks
    piece, gap = 8 * block_words // num_pieces, 8 * draw(st.integers(0, 2))
    if num_layers == 1:
        strides = (0, piece + gap)
    elif draw(st.booleans()):  # piece by piece
        strides = (num_blocks * (piece + gap) + 8 * draw(st.integers(0, 2)), piece + gap)
    else:  # block by block
        strides = (piece + gap, num_layers * (piece + gap) + 8 * draw(st.integers(0, 2)))
    addresses = draw(st.permutations(range(num_ranks)))
    regions = tuple(Region(100_000 * each + 8 * draw(st.integers(0, 5))) for each in addresses)
    return Geometry(regions, num_blocks, num_pieces, piece, *strides)


def bytes_of(geometry: Geometry, block_id: int) -> list[int]:
    """The dumb model: where each byte of a block is."""
    starts = [
        region.address + block_id * geometry.block_stride + layer * geometry.piece_stride
        for layer in range(geometry.num_pieces // len(geometry.regions))
        for region in geometry.regions
    ]
    return [start + i for start in starts for i in range(geometry.piece_bytes)]


@given(st.data())
def test_each_byte_of_each_block_goes_to_its_place_and_no_other(data: st.DataObject) -> None:
    num_words = data.draw(st.sampled_from([12, 24]))
    theirs, ours = (data.draw(geometries(num_blocks, num_words)) for num_blocks in (9, 7))
    targets = data.draw(st.permutations(range(7)))[: data.draw(st.integers(1, 7))]
    sources = data.draw(st.lists(st.integers(0, 8), min_size=len(targets), max_size=len(targets)))
    unit_bytes = fitting_unit(ours, theirs)
    here, there = prepared(ours, unit_bytes), prepared(theirs, unit_bytes)
    moved: dict[int, int] = {}
    for into, of in cut(here.indexes(targets), there.indexes(sources)):
        for target, source in zip(into.tolist(), of.tolist(), strict=True):
            (to_address, to_size), (from_address, from_size) = here.handle[target], there.handle[source]  # type: ignore[index]
            assert to_size == from_size == unit_bytes
            assert not {to_address + i for i in range(unit_bytes)} & moved.keys(), "no byte is read twice"
            moved |= {to_address + i: from_address + i for i in range(unit_bytes)}
    assert moved == {
        target: source
        for from_id, to_id in zip(sources, targets, strict=True)
        for source, target in zip(bytes_of(theirs, from_id), bytes_of(ours, to_id), strict=True)
    }


def test_neighbouring_blocks_are_neighbours_in_each_unit_so_that_nixl_can_join_them() -> None:
    blocks = prepared(LAYERS, 16)
    spans = [blocks.handle[index] for index in blocks.indexes([1, 2, 3]).tolist()]  # type: ignore[index]
    assert spans == [(4096 + piece * 80 + block * 16, 16) for piece in range(3) for block in (1, 2, 3)]


@pytest.mark.parametrize("ids", [[5], [-1], [0, 1, 2, 3, 4, 5], [1 << 40]])
def test_blocks_that_are_not_there_are_refused_and_are_none_of_the_next_piece(ids: list[int]) -> None:
    with pytest.raises(TransportError, match="of a pool of 5"):
        prepared(LAYERS, 16).indexes(ids)


def test_a_read_of_many_units_is_posted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_pool, "_MAX_POSTED", 4)
    targets, sources = np.arange(10, dtype=np.int32), np.arange(10, 20, dtype=np.int32)
    parts = cut(targets, sources)
    assert [len(into) for into, _ in parts] == [4, 4, 2]
    assert np.concatenate([into for into, _ in parts]).tolist() == targets.tolist()
    assert np.concatenate([of for _, of in parts]).tolist() == sources.tolist()


# ---- the address ----


class OlderAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As it was when a block had one piece."""

    metadata: bytes
    memory_kind: str
    device_id: int
    address: int
    num_blocks: int
    block_bytes: int
    token_address: int
    token: bytes


def encoded(geometry: Geometry) -> bytes:
    return msgspec.msgpack.encode(pool_address(b"agent", "cpu", geometry, 64, bytes(16)))


def test_a_pool_of_whole_blocks_is_told_as_it_was_before_there_were_pieces() -> None:
    geometry = HostMemory.allocate(4, 64).geometry
    older = OlderAddress(b"agent", "DRAM", 0, geometry.regions[0].address, 4, 64, 64, bytes(16))
    assert encoded(geometry) == msgspec.msgpack.encode(older)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(older), type=PoolAddress).geometry == geometry
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(encoded(LAYERS), type=OlderAddress)  # rather than read other bytes


@pytest.mark.parametrize(
    "geometry",
    [
        LAYERS,
        dataclasses.replace(LAYERS, piece_stride=16, block_stride=64),
        RANKS,
        Geometry((Region(8),), num_blocks=3, num_pieces=1, piece_bytes=64, piece_stride=0, block_stride=72),
        Geometry((Region(8),), num_blocks=1, num_pieces=1, piece_bytes=64, piece_stride=0, block_stride=64),
    ],
)
def test_a_geometry_arrives_as_it_was_sent(geometry: Geometry) -> None:
    assert msgspec.msgpack.decode(encoded(geometry), type=PoolAddress).geometry == geometry


@pytest.mark.parametrize(
    "lie",
    [
        {"num_pieces": 0},
        {"num_pieces": -1},
        {"num_pieces": 5},
        {"num_pieces": 1 << 62},
        {"num_pieces": 1},
        {"piece_stride": 8},
        {"piece_stride": -80},
        {"block_stride": 1},
        {"block_stride": -16},
        {"num_blocks": 0},
        {"num_blocks": 1 << 60},
        {"block_bytes": 0},
        {"block_bytes": -48},
        {"address": -8},
        {"address": (1 << 64) - 8},
        {"more_regions": [[8192, 0]]},
        {"num_pieces": 6, "block_bytes": 96, "more_regions": [[4096, 0]]},
        {"num_pieces": 6, "block_bytes": 96, "more_regions": [[-8, 0]]},
    ],
)
def test_an_address_that_can_be_none_is_refused(lie: dict[str, Any]) -> None:
    said = msgspec.msgpack.decode(encoded(LAYERS)) | lie
    with pytest.raises(TransportError, match="a pool as none can be"):
        _ = msgspec.convert(said, PoolAddress).geometry


def test_pools_that_do_not_fit_or_would_take_all_memory_to_describe_are_refused() -> None:
    with pytest.raises(TransportError, match="blocks of 64 bytes, ours have 48"):
        fitting_unit(LAYERS, HostMemory.allocate(4, 64).geometry)
    tiny = Geometry(
        (Region(0),), num_blocks=1 << 20, num_pieces=32, piece_bytes=8, piece_stride=1 << 23, block_stride=8
    )
    with pytest.raises(TransportError, match="33554432 pieces of 8 bytes"):
        fitting_unit(HostMemory.allocate(4, 256).geometry, tiny)
