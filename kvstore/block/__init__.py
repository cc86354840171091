"""Defines a block: its identity, its shape, its bytes, and the proof that they are those computed.

Everything else in kvstore is about where blocks live and how they move."""

from kvstore.block.geometry import Geometry, Region
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
from kvstore.block.layout import DTYPE_BYTES, NATIVE_LAYOUT_VERSION, BlockLayout
from kvstore.block.memory import BlockMemory, HostMemory, PieceMemory, Staging
from kvstore.block.proof import MAX_PROOF, MIN_KEY_BYTES, Proof, ProofKey, Subject, subject_of
from kvstore.block.row_sums import ROW_WORDS, Multipliers, is_compiled
from kvstore.block.runs import Run, coalesce
from kvstore.block.shared_tokens import BlockTokens, SharedTokenIndex, SharedTokens
from kvstore.block.unkeyed import MAX_CHECKSUM, Checksum, checksum, checksums, find_changed, public_multipliers

__all__ = [
    "DTYPE_BYTES",
    "HASH_BYTES",
    "MAX_CHECKSUM",
    "MAX_PROOF",
    "MIN_KEY_BYTES",
    "NATIVE_LAYOUT_VERSION",
    "ROW_WORDS",
    "BlockHash",
    "BlockLayout",
    "BlockMemory",
    "BlockTokens",
    "Checksum",
    "Geometry",
    "HostMemory",
    "Multipliers",
    "PieceMemory",
    "Proof",
    "ProofKey",
    "Region",
    "Run",
    "SharedTokenIndex",
    "SharedTokens",
    "Staging",
    "Subject",
    "checksum",
    "checksums",
    "coalesce",
    "extend_hashes",
    "find_changed",
    "hash_block",
    "hash_blocks",
    "is_compiled",
    "namespace",
    "pack_hashes",
    "public_multipliers",
    "subject_of",
    "unpack_hashes",
]
