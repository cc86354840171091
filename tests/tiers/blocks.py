"""Blocks for the tests of the tiers: small layouts, named chains, and payloads that follow from the hash."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockHash, BlockLayout, Proof
from kvstore.block.digest import digest_rows

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_size=4, head_dim=8, dtype="float32", model_fingerprint="m1")
OTHER_LAYOUT = BlockLayout(
    num_layers=1, num_kv_heads=1, block_size=4, head_dim=8, dtype="float32", model_fingerprint="m2"
)
BLOCK_BYTES = LAYOUT.block_bytes  # 256


def named_hash(name: str) -> BlockHash:
    return BlockHash(hashlib.blake2b(name.encode(), digest_size=16).digest())


def chain(name: str, length: int) -> list[BlockHash]:
    return [named_hash(f"{name}/{i}") for i in range(length)]


def parents(hashes: list[BlockHash]) -> list[BlockHash | None]:
    return [None, *hashes[:-1]]


def payload(block_hash: BlockHash, block_bytes: int = BLOCK_BYTES) -> npt.NDArray[np.uint8]:
    """The one right content of a block."""
    return np.frombuffer(hashlib.shake_128(block_hash).digest(block_bytes), dtype=np.uint8)


def proof(block_hash: BlockHash, block_bytes: int = BLOCK_BYTES) -> Proof:
    return Proof(digest_rows(payload(block_hash, block_bytes).view("<i8").reshape(1, -1))[0])
