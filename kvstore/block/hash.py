"""Hashes blocks: a block's identity is its tokens, those before them, the model, and the tenant.

A block's hash is BLAKE2b-128 over its parent's hash and its own token ids, so equal hashes mean equal prefixes. The
chain starts at a namespace of model fingerprint, cache salt and adapter: two tenants or two fine-tunes never share a
block. The values are the same on every machine; routers, workers and stores compare them as they are.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from typing import NewType

import numpy as np
import numpy.typing as npt

BlockHash = NewType("BlockHash", bytes)

HASH_BYTES = 16

# BLAKE2b's personalisation separates the two uses: no block can ever hash like a namespace. The digits are versions;
# they change with the encoding below, and with them every hash.
_NAMESPACE_PERSON = b"tandem.space.1"
_BLOCK_PERSON = b"tandem.block.1"


def namespace(model_fingerprint: str, cache_salt: str = "", adapter: str = "") -> BlockHash:
    """Return the root of the hash chain for one model, tenant salt and adapter.

    Every part is preceded by its length, so that no two different triples encode to the same bytes.
    """
    encoded = bytearray()
    for part in (model_fingerprint, cache_salt, adapter):
        # A salt comes from JSON and may hold lone surrogates; "surrogatepass" keeps the encoding total and one to one.
        part_bytes = part.encode("utf-8", "surrogatepass")
        encoded += len(part_bytes).to_bytes(8, "little") + part_bytes
    return BlockHash(hashlib.blake2b(encoded, digest_size=HASH_BYTES, person=_NAMESPACE_PERSON).digest())


def hash_blocks(
    root: BlockHash, token_ids: Sequence[int] | npt.NDArray[np.integer], block_size: int
) -> list[BlockHash]:
    """Return the chained hashes of the full blocks of `token_ids`; a partial last block has no hash.

    Raises ValueError for a token id outside 0 .. 2**32 - 1 or a block size below 1.
    """
    hashes: list[BlockHash] = []
    extend_hashes(root, hashes, token_ids, block_size)
    return hashes


def pack_hashes(hashes: Sequence[BlockHash]) -> bytes:
    """Return the hashes as they travel: one after the other."""
    return b"".join(hashes)


def unpack_hashes(packed: bytes) -> list[BlockHash]:
    """Return what `pack_hashes` packed. Raises ValueError for a length that no list of hashes has."""
    if len(packed) % HASH_BYTES:
        raise ValueError(f"packed hashes have a multiple of {HASH_BYTES} bytes, not {len(packed)}")
    return [BlockHash(packed[start : start + HASH_BYTES]) for start in range(0, len(packed), HASH_BYTES)]


def hash_block(parent: BlockHash, token_ids: Sequence[int] | npt.NDArray[np.integer]) -> BlockHash:
    """Return the hash of one full block after `parent`. Errors as `hash_blocks`."""
    return _hash_block(parent, _encode(token_ids))


def extend_hashes(
    root: BlockHash,
    hashes: list[BlockHash],
    token_ids: Sequence[int] | npt.NDArray[np.integer],
    block_size: int,
) -> None:
    """Append to `hashes` those of the blocks of `token_ids` that became full since `hashes` was made.

    `token_ids` is the whole sequence; only its new full blocks are looked at, so calling this for every generated token
    is cheap. Errors as `hash_blocks`.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    first, end = len(hashes), len(token_ids) // block_size
    if end <= first:
        return
    encoded = _encode(token_ids[first * block_size : end * block_size])
    parent = hashes[-1] if hashes else root
    stride = 4 * block_size
    for start in range(0, len(encoded), stride):
        parent = _hash_block(parent, encoded[start : start + stride])
        hashes.append(parent)


def _hash_block(parent: BlockHash, encoded_tokens: bytes) -> BlockHash:
    # The parent's length is fixed, so plain concatenation is unambiguous.
    return BlockHash(hashlib.blake2b(parent + encoded_tokens, digest_size=HASH_BYTES, person=_BLOCK_PERSON).digest())


def _encode(token_ids: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
    """Little-endian uint32, checked first: a silent wrap would make two different prompts equal."""
    if isinstance(token_ids, list | tuple) and sys.byteorder == "little":
        try:
            return array("I", token_ids).tobytes()  # a quarter of numpy's time for Python's integers
        except (OverflowError, TypeError) as error:
            raise ValueError(f"token ids must be integers in 0 .. 2**32 - 1: {error}") from error
    numbers = np.asarray(token_ids)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise ValueError(f"token ids must be a flat sequence of integers below 2**32, not {numbers.dtype}")
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= 2**32:
        raise ValueError(f"token ids must lie in 0 .. 2**32 - 1, found {low} .. {high}")
    return numbers.astype("<u4").tobytes()
