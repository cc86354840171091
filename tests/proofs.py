"""Proofs of the blocks that tests make up, under the key that everybody knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvstore.block import BlockHash, BlockMemory, Proof, ProofKey, subject_of

KEY: Final = ProofKey.public()


def prove(memory: BlockMemory, block_ids: Sequence[int], hashes: Sequence[BlockHash]) -> list[Proof]:
    """Prove blocks, each to be what its hash says."""
    return KEY.prove(memory, block_ids, [subject_of(block_hash) for block_hash in hashes])


def prove_handoff(memory: BlockMemory, block_ids: Sequence[int], transfer_id: bytes, first: int = 0) -> list[Proof]:
    """Prove blocks without a hash, each to be in its place in a transfer."""
    subjects = [subject_of(None, transfer_id, index) for index in range(first, first + len(block_ids))]
    return KEY.prove(memory, block_ids, subjects)
