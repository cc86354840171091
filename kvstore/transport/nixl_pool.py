"""Describes a pool of blocks to NIXL: our own to the agent, an owner's to a reader.

Each end's blocks are cut into units that fit both ends' pieces, and each unit of each block is a descriptor, prepared
once and known by its index from then on: `unit * num_blocks + block`. So neighbouring blocks are neighbours in each
unit, which NIXL joins where they are so in both memories.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
import numpy.typing as npt

from kvstore.block import Geometry, Region
from kvstore.errors import TransportError

if TYPE_CHECKING:
    from nixl_cu13._api import nixl_agent, nixl_prepped_dlist_handle

_MAX_PREPARED: Final = 1 << 24  # of one pool: each takes some 50 bytes
_MAX_POSTED: Final = 4096  # at a time: to post them takes the agent's thread milliseconds

Indexes = npt.NDArray[np.int32]


class PoolAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The facts by which a reader reaches every block of an owner's pool.

    Those of pieces, and of more regions, are left out where there is one: an older reader knows no more of them.
    """

    metadata: bytes
    memory_kind: str
    device_id: int
    address: int
    num_blocks: int
    block_bytes: int
    token_address: int
    token: bytes
    """At `token_address`, in main memory: reading it proves that the path works."""
    num_pieces: int = 1
    piece_stride: int = 0
    block_stride: int = 0
    """0: `block_bytes`."""
    more_regions: tuple[tuple[int, int], ...] = ()
    """Address and device of each region but the first."""

    @property
    def geometry(self) -> Geometry:
        """Where the blocks lie. Raises `TransportError` where they can lie nowhere."""
        piece_bytes, rest = divmod(self.block_bytes, max(1, self.num_pieces))
        stride = self.block_stride or self.block_bytes
        try:
            if rest:
                raise ValueError(f"{self.num_pieces} equal pieces of {self.block_bytes} bytes")
            regions = tuple(Region(*each) for each in ((self.address, self.device_id), *self.more_regions))
            return Geometry(regions, self.num_blocks, self.num_pieces, piece_bytes, self.piece_stride, stride)
        except ValueError as error:
            raise TransportError(f"nixl: a pool as none can be: {error}") from error


@dataclass
class Remote:
    """An owner's pool, ready to be read. `generation` is the agent's: a reset agent has forgotten it.

    `is_former`: it is known from links that have ended, and its connections may have broken since.
    """

    agent_name: str
    generation: int
    is_former: bool = False


@dataclass(frozen=True)
class Prepared:
    """A pool's descriptors. `unit_bytes` divides the pieces of both ends."""

    handle: nixl_prepped_dlist_handle
    geometry: Geometry
    unit_bytes: int

    def indexes(self, block_ids: Sequence[int]) -> Indexes:
        """Return those of these blocks, unit by unit. Raises `TransportError` for blocks that are not there."""
        ids, num_blocks = np.array(block_ids, np.int64), self.geometry.num_blocks
        if ids.size and not 0 <= ids.min() <= ids.max() < num_blocks:
            raise TransportError(f"blocks {ids.min()} to {ids.max()} of a pool of {num_blocks}")
        units = np.arange(self.geometry.block_bytes // self.unit_bytes) * num_blocks
        indexes: Indexes = (units[:, None] + ids).astype(np.int32).reshape(-1)
        return indexes


def memory_kind(device: str) -> str:
    """NIXL's name for a pool's memory."""
    return "DRAM" if device == "cpu" else "VRAM"


def pool_address(metadata: bytes, device: str, geometry: Geometry, token_address: int, token: bytes) -> PoolAddress:
    """Return what readers are told of our pool."""
    first, *more = geometry.regions
    return PoolAddress(
        metadata,
        memory_kind(device),
        first.device_id,
        first.address,
        geometry.num_blocks,
        geometry.block_bytes,
        token_address,
        token,
        geometry.num_pieces,
        geometry.piece_stride,
        0 if geometry.is_contiguous else geometry.block_stride,
        tuple((each.address, each.device_id) for each in more),
    )


def fitting_unit(ours: Geometry, theirs: Geometry) -> int:
    """Return the size of a unit. Raises `TransportError` where blocks differ in size, or would be too many units."""
    if ours.block_bytes != theirs.block_bytes:
        raise TransportError(f"blocks of {theirs.block_bytes} bytes, ours have {ours.block_bytes}")
    unit_bytes = math.gcd(ours.piece_bytes, theirs.piece_bytes)
    num_units = ours.block_bytes // unit_bytes * max(ours.num_blocks, theirs.num_blocks)
    if num_units > _MAX_PREPARED:
        raise TransportError(f"{num_units} pieces of {unit_bytes} bytes, more than {_MAX_PREPARED}")
    return unit_bytes


def prepare(agent: nixl_agent, agent_name: str, kind: str, geometry: Geometry, unit_bytes: int) -> Prepared:
    """Make a pool's descriptors known to the agent, under the name of whose it is: one for each unit, with a stride."""
    same = (geometry.block_stride, geometry.num_blocks)
    starts = geometry.starts(unit_bytes)
    units = np.array([[each.address, unit_bytes, each.device_id, *same] for each in starts], np.uint64)
    return Prepared(agent.prep_xfer_dlist(agent_name, units, kind), geometry, unit_bytes)


def cut(targets: Indexes, sources: Indexes) -> list[tuple[Indexes, Indexes]]:
    """Cut a read into what is posted at a time."""
    starts = range(0, max(1, len(targets)), _MAX_POSTED)
    return [(targets[start : start + _MAX_POSTED], sources[start : start + _MAX_POSTED]) for start in starts]
