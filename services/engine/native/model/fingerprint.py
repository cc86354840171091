"""Fingerprints a model: a digest over configuration, dtype and all weight bytes.

Two fine-tunes with equal headers must never share a block, so every byte counts, and it must cost no more than
reading the weights costs: each tensor's rows are summed (`kvstore.block.row_sums`, under multipliers that everybody
knows), and the sums go, with the tensor's name, dtype and shape, into BLAKE2b.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from kvstore.block import NATIVE_LAYOUT_VERSION
from services.engine.byte_sums import add_bytes
from services.engine.model_config import ModelConfig

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

    def finish(self, config: ModelConfig, dtype: str, quantization: str = "none", kv_cache_dtype: str = "auto") -> str:
        """Return the fingerprint, 32 hex digits, of the model computed and stored in `dtype`.

        Quantized weights are other weights, and a quantized cache has other bytes: their workers share no block with
        others. Kernels and device are left out: results differ in rounding alone, and workers on unlike machines are
        to share blocks.
        """
        fields = {name: value for name, value in asdict(config).items() if name not in _IRRELEVANT_FIELDS}
        identity = {"layout": NATIVE_LAYOUT_VERSION, "dtype": dtype, "config": fields, "weights": self._tensors}
        if quantization != "none":
            identity["quantization"] = quantization
        if kv_cache_dtype != "auto":
            identity["kv_cache_dtype"] = kv_cache_dtype
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16, person=b"tandem.model").hexdigest()


def tensor_digest(data: npt.NDArray[np.uint8]) -> str:
    """Return 32 hex digits that depend on every bit of `data`, uint8 `(num_bytes,)`."""
    digest = hashlib.blake2b(len(data).to_bytes(8, "little"), digest_size=16, person=b"tandem.tensor")
    add_bytes(digest, data)
    return digest.hexdigest()
