"""The engine's arithmetic by hashing: each token depends on every KV byte that it should have seen, and on no other.

What runs is the native engine, with its scheduler, block pool, runner and sampler; only the model is another. The keys
and values of a token are a hash of its own id and of those of the token before, *as they stand in the cache*; the
logits are a hash over all of the context's. So a wrong byte anywhere, or a block of another prompt, gives other tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.block import ProofKey
from services.engine.config import EngineConfig
from services.engine.native import Engine
from services.engine.native.attention import ForwardBatch
from services.engine.native.model.model import ComputePath, LoadedModel

VOCAB_SIZE: Final = 128
MAX_MODEL_LEN: Final = 256
FINGERPRINT: Final = "51"
PROOF_KEY: Final = ProofKey(b"what the simulated workers alone know")
_HEAD_DIM: Final = 4
_HALF_BYTES: Final = 4 * _HEAD_DIM  # of a token's keys, and of its values: float32
_FIRST: Final = bytes(2 * _HALF_BYTES)


class HashComputation:
    """`Computation` of the native engine. `on_forward`: called with the number of tokens that a step computes."""

    stage_seconds: Mapping[str, float] = {}

    def __init__(self, on_forward: Callable[[int], None] = lambda num_tokens: None) -> None:
        self._on_forward = on_forward

    def use_cache(self, kv_cache: Tensor) -> None: ...

    def forward(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        # [num_blocks, keys and values, block_size, bytes]
        self._on_forward(len(batch.token_ids))
        cache = kv_cache.numpy().view(np.uint8)[:, 0, :, 0]
        wanted, logits, row = set(batch.logits_indices.tolist()), [], 0
        token_ids, tables = batch.token_ids.tolist(), batch.block_tables.numpy()
        for sequence, end in enumerate(batch.context_lens):
            num_tokens = batch.num_queries(sequence)
            for position in range(end - num_tokens, end):
                before = _stored(cache, tables[sequence], position - 1) if position else _FIRST
                _store(cache, tables[sequence], position, _hash_token(before, token_ids[row]))
                if row in wanted:
                    logits.append(_logits(_context(cache, tables[sequence], position + 1)))
                row += 1
        return torch.from_numpy(np.stack(logits)) if logits else torch.empty(0, VOCAB_SIZE)


def undisturbed_logits(context: Sequence[int], num_last: int) -> Tensor:
    """What follows each of the last tokens of a context: float32 `[num_last, vocab_size]`."""
    stored = _FIRST
    states = b""
    rows = []
    for position, token_id in enumerate(context, start=1):
        stored = _hash_token(stored, token_id)
        states += stored
        if position > len(context) - num_last:
            rows.append(_logits(states))
    return torch.from_numpy(np.stack(rows))


def make_engine(
    config: EngineConfig,
    num_blocks: int,
    num_host_slots: int,
    clock: Callable[[], float],
    on_forward: Callable[[int], None] = lambda num_tokens: None,
) -> Engine:
    """A native engine that computes so."""
    shape = SimpleNamespace(num_layers=1, num_kv_heads=1, head_dim=_HEAD_DIM, vocab_size=VOCAB_SIZE, eos_token_ids=())
    model = LoadedModel(
        directory=Path(),
        config=shape,  # type: ignore[arg-type]
        dtype="float32",
        device="cpu",
        fingerprint=FINGERPRINT,
        max_model_len=MAX_MODEL_LEN,
        computation=HashComputation(on_forward),
        compute_path=ComputePath("hash", "none", "for a simulation"),
    )
    return Engine(model, config, num_blocks, clock, num_host_slots, proof_key=PROOF_KEY)


_Cache = npt.NDArray[np.uint8]


def _hash_token(before: bytes, token_id: int) -> bytes:
    return hashlib.blake2b(before + token_id.to_bytes(4, "big"), digest_size=2 * _HALF_BYTES).digest()


def _logits(context: bytes) -> npt.NDArray[np.float32]:
    raw = hashlib.shake_128(context).digest(2 * VOCAB_SIZE)
    return np.frombuffer(raw, dtype="<u2").astype(np.float32) / 4096


def _stored(cache: _Cache, table: npt.NDArray[Any], position: int) -> bytes:
    block_id, offset = table[position // cache.shape[2]], position % cache.shape[2]
    return cache[block_id, :, offset].tobytes()


def _store(cache: _Cache, table: npt.NDArray[Any], position: int, token: bytes) -> None:
    block_id, offset = table[position // cache.shape[2]], position % cache.shape[2]
    cache[block_id, :, offset] = np.frombuffer(token, dtype=np.uint8).reshape(2, _HALF_BYTES)


def _context(cache: _Cache, table: npt.NDArray[Any], num_tokens: int) -> bytes:
    """The keys and values of the first tokens, token by token."""
    blocks = cache[table[: -(-num_tokens // cache.shape[2])]]
    return blocks.transpose(0, 2, 1, 3).reshape(-1, 2 * _HALF_BYTES)[:num_tokens].tobytes()
