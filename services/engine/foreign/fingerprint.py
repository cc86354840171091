"""Tells models apart whose files another project's engine reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvstore.block import public_multipliers
from services.engine.model_config import UnsupportedModel

_BYTES_AT_ONCE: Final = 1 << 22
_IRRELEVANT_SETTINGS: Final = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def model_fingerprint(
    directory: Path, config: Mapping[str, Any], said: Sequence[Any], tell: Callable[[float], None]
) -> str:
    """Return 32 hex digits over a model's configuration, what else is `said` of it, and every byte of its weights.

    `tell` hears the share of the bytes that are read. Raises `UnsupportedModel`.
    """
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
    if not files:
        raise UnsupportedModel(f"{directory} has no weights that could be told apart (*.safetensors, *.bin)")
    kept = {name: value for name, value in config.items() if name not in _IRRELEVANT_SETTINGS}
    digest = hashlib.blake2b(digest_size=16, person=b"tandem.foreign")
    digest.update(json.dumps([kept, *said], sort_keys=True, default=str).encode())
    num_bytes, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        data = np.memmap(file, np.uint8, "r")
        for start in range(0, len(data), _BYTES_AT_ONCE):
            piece = np.array(data[start : start + _BYTES_AT_ONCE])
            padded = np.concatenate([piece, np.zeros(-len(piece) % 8, np.uint8)]) if len(piece) % 8 else piece
            digest.update(public_multipliers().sums(padded.view("<u8")))
            done += len(piece)
            tell(done / num_bytes)
    return digest.hexdigest()
