"""Defines a block: its identity, its shape, its bytes, and the proof that they are those computed.

Everything else in kvstore is about where blocks live and how they move."""

from kvstore.block.digest import multipliers
from kvstore.block.hash import (
    HASH_BYTES,
    BlockHash,
    extend_hashes,
    hash_block,
    hash_blocks,
    namespace,
    pack_hashes,
    unpack_hashes,
)
from kvstore.block.layout import DTYPE_BYTES, LAYOUT_VERSION, BlockLayout
from kvstore.block.memory import BlockMemory, HostMemory
from kvstore.block.proof import MAX_PROOF, Proof, find_wrong, prove, proves
from kvstore.block.runs import Run, coalesce
from kvstore.block.shared_tokens import BlockTokens, SharedTokenIndex, SharedTokens

__all__ = [
    "DTYPE_BYTES",
    "HASH_BYTES",
    "LAYOUT_VERSION",
    "MAX_PROOF",
    "BlockHash",
    "BlockLayout",
    "BlockMemory",
    "BlockTokens",
    "HostMemory",
    "Proof",
    "Run",
    "SharedTokenIndex",
    "SharedTokens",
    "coalesce",
    "extend_hashes",
    "find_wrong",
    "hash_block",
    "hash_blocks",
    "multipliers",
    "namespace",
    "pack_hashes",
    "prove",
    "proves",
    "unpack_hashes",
]
