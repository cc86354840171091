"""Says what a token's keys and values take in the native engine's cache: the model's dtype, or 8 bits. No torch.

In 8 bits (`--kv-cache-dtype int8`) the key, or the value, of one token and KV head is one row: head_dim whole numbers
from -127 to 127, and behind them the float32 that they are to be multiplied by (native/kernels/csrc/kv_rows.h). A row
follows from its own elements alone, so blocks are the same however tokens were batched, and a block is one run of bytes
as it is in other types.
"""

from __future__ import annotations

from typing import Final

from services.engine.model_config import DTYPE_BYTES

NATIVE_KV_CACHE_DTYPES: Final = ("auto", "int8")
"""What the native engine keeps keys and values in; everything else is vLLM's."""
INT8_SCALE_BYTES: Final = 4


def row_bytes(head_dim: int, dtype: str, kv_cache_dtype: str) -> int:
    """Return the bytes of one token's key, or value, of one KV head, for a model of `dtype`."""
    return head_dim + INT8_SCALE_BYTES if kv_cache_dtype == "int8" else head_dim * DTYPE_BYTES[dtype]
