"""Fingerprints a model: a digest over configuration, dtype and all weight bytes.

Two fine-tunes with equal headers must never share a block, so every byte counts, and it must cost no more than
reading the weights costs: each tensor is cut into rows of 64 KiB, each row hashed multilinearly (see
`kvstore.block.digest`), and the row hashes go, with the tensor's name, dtype and shape, into BLAKE2b.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from kvstore.block import LAYOUT_VERSION, multipliers
from services.engine.model_config import ModelConfig

_ROW_WORDS = 8192
_ROWS_AT_ONCE = 16  # 1 MiB: the second pass over it comes from cache

# They change what is refused or when generation ends, but no key and no value.
_IRRELEVANT_FIELDS = ("max_position_embeddings", "eos_token_ids", "dtype", "architecture")


class FingerprintBuilder:
    """Collects the weights of one model, in any order: sharding and file order do not matter."""

    def __init__(self) -> None:
        self._tensors: dict[str, str] = {}

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: npt.NDArray[np.uint8]) -> None:
        """Take in one tensor as the checkpoint stores it: `data` is uint8 `(num_bytes,)`."""
        assert name not in self._tensors, name
        self._tensors[name] = f"{dtype}{list(shape)}:{tensor_digest(data)}"

    def finish(self, config: ModelConfig, dtype: str, quantization: str = "none") -> str:
        """Return the fingerprint, 32 hex digits, of the model computed and stored in `dtype`.

        Quantized weights are other weights: their workers share no block with others. Kernels and device are left out:
        results differ in rounding alone, and workers on unlike machines are to share blocks.
        """
        fields = {name: value for name, value in asdict(config).items() if name not in _IRRELEVANT_FIELDS}
        identity = {"layout": LAYOUT_VERSION, "dtype": dtype, "config": fields, "weights": self._tensors}
        if quantization != "none":
            identity["quantization"] = quantization
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16, person=b"tandem.model").hexdigest()


def tensor_digest(data: npt.NDArray[np.uint8]) -> str:
    """Return 32 hex digits that depend on every bit of `data`, uint8 `(num_bytes,)`.

    A multilinear hash does not see an even number of flipped topmost bits (signs, in weights), so each row is hashed
    a second time by its words' upper halves alone, where these bits are not topmost.
    """
    digest = hashlib.blake2b(len(data).to_bytes(8, "little"), digest_size=16, person=b"tandem.tensor")
    row_bytes = _ROW_WORDS * 8
    table = multipliers(_ROW_WORDS)
    for start in range(0, len(data), row_bytes * _ROWS_AT_ONCE):
        piece = data[start : start + row_bytes * _ROWS_AT_ONCE]
        if len(piece) % row_bytes:
            piece = np.concatenate([piece, np.zeros(-len(piece) % row_bytes, dtype=np.uint8)])
        words = piece.view("<i8").reshape(-1, _ROW_WORDS)
        digest.update(np.einsum("ij,j->i", words, table).astype("<i8").tobytes())
        digest.update(np.einsum("ij,j->i", words >> 32, table).astype("<i8").tobytes())
    return digest.hexdigest()
