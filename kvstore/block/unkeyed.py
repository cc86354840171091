"""Finds blocks that have changed where they rest, without a key: for stores, which cannot check proofs.

A store computes a block's checksum when it has taken it in, and checks it when the block comes from disk or somebody
doubts it. It is made as a proof is, under multipliers that everybody knows: accidents cannot choose their bytes.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Final, NewType

import numpy as np
import numpy.typing as npt

from kvstore.block.memory import BlockMemory
from kvstore.block.row_sums import Multipliers

Checksum = NewType("Checksum", int)

MAX_CHECKSUM: Final = (1 << 64) - 1


def checksums(memory: BlockMemory, block_ids: Sequence[int]) -> list[Checksum]:
    """Return the checksums of blocks as they are now: a pass over them."""
    return [_fold(sums) for sums in memory.sums(block_ids, public_multipliers())]


def find_changed(memory: BlockMemory, block_ids: Sequence[int], expected: Sequence[Checksum | None]) -> list[int]:
    """Return the positions in `block_ids` of blocks that are not what they were."""
    pairs = enumerate(zip(checksums(memory, block_ids), expected, strict=True))
    return [position for position, (now, before) in pairs if now != before]


def checksum(payload: memoryview | npt.NDArray[np.uint8]) -> Checksum:
    """Return the checksum of one block's bytes, a multiple of 8."""
    return _fold(public_multipliers().sums(np.frombuffer(payload, dtype="<u8")))


@functools.cache
def public_multipliers() -> Multipliers:
    """Those that everybody knows."""
    return Multipliers.of(b"public")


def _fold(sums: bytes) -> Checksum:
    return Checksum(int.from_bytes(hashlib.blake2b(sums, digest_size=8).digest(), "little"))
