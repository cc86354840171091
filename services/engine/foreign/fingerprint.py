"""Tells models apart whose files another project's engine reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from services.engine.byte_sums import add_bytes
from services.engine.config import EngineConfig
from services.settings import block_meaning

_IRRELEVANT_SETTINGS: Final = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_LENGTH: Final = "original_max_position_embeddings"


def said_of(config: Mapping[str, Any], dtype: str, max_model_len: int, asked: EngineConfig) -> list[object]:
    """Return what beside configuration and files decides on what is in a block: the same on both sides of a handoff."""
    # Whoever quantizes weights that are not so in the files, says how.
    quantization = "" if config.get("quantization_config") else asked.quantization
    meaning = block_meaning(asked.engine_args)
    if asked.kv_cache_dtype != "auto":
        meaning = tuple(sorted((*meaning, f"--kv-cache-dtype {asked.kv_cache_dtype}")))
    return [dtype, meaning, quantization, rope_factors(config, max_model_len)]


def rope_factors(config: Mapping[str, Any], max_model_len: int) -> str:
    """Say which factors LongRoPE takes (Phi-3 128k and its like); empty for other ways to tell places.

    vLLM takes the long ones for all prompts where a worker's context is longer than that of the training: keys of
    two such workers of one model differ. https://arxiv.org/abs/2402.13753
    """
    for each in _mappings(config):
        if each.get("rope_type", each.get("type")) in ("longrope", "su"):
            length = each.get(_LENGTH) or config.get(_LENGTH)
            return f"of {max_model_len}" if length is None else "long" if max_model_len > length else "short"
    return ""


def _mappings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _mappings(value)


def model_fingerprint(
    files: Sequence[Path], config: Mapping[str, Any], said: Sequence[Any], tell: Callable[[float], None]
) -> str:
    """Return 32 hex digits over a model's configuration, what else is `said` of it, and every byte of its weights.

    `tell` hears the share of the bytes that are read.
    """
    kept = {name: value for name, value in config.items() if name not in _IRRELEVANT_SETTINGS}
    digest = hashlib.blake2b(digest_size=16, person=b"tandem.foreign")
    digest.update(json.dumps([kept, *said], sort_keys=True, default=str).encode())
    num_bytes, num_read = sum(file.stat().st_size for file in files), 0

    def tell_share(num_more: int) -> None:
        nonlocal num_read
        num_read += num_more
        tell(num_read / num_bytes)

    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        add_bytes(digest, np.memmap(file, np.uint8, "r"), tell_share)
    return digest.hexdigest()
