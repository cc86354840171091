"""Declares the native engine's blocks to peers, stores and whoever sizes a pool. No torch."""

from __future__ import annotations

from typing import Final

from kvstore.block import BlockLayout
from services.engine.kv_cache_dtype import row_bytes
from services.engine.model_config import ModelConfig

_INT8_SCALES: Final = "int8 with a float32 behind each row"


def native_layout(
    model: ModelConfig, dtype: str, kv_cache_dtype: str, block_size: int, model_fingerprint: str
) -> BlockLayout:
    """Return the layout of a model's blocks; in 8 bits an element is a byte, of the scale's, too.

    Raises `InvalidLayout` for a block size that gives no block.
    """
    is_int8 = kv_cache_dtype == "int8"
    return BlockLayout(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        block_size=block_size,
        head_dim=row_bytes(model.head_dim, dtype, kv_cache_dtype) if is_int8 else model.head_dim,
        dtype="uint8" if is_int8 else dtype,
        model_fingerprint=model_fingerprint,
        scales=_INT8_SCALES if is_int8 else "",
    )
