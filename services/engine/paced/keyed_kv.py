"""Stands in for a model: what it writes as a token's KV follows from the prompt so far, and its logits from all of it.

A token's state is a polynomial hash of the tokens up to it, and is kept in its KV alone: each 8-byte word of it, in all
layers, of keys and values, is the state times an odd number of the word's own. So the next token's state needs the KV
of the one before, and logits need the KV of the whole context: of a block that is missing, stale, torn or another
prompt's comes another token. Each step reads one word of each token, another one each time; the blocks' proofs, which
are real, see to single bits.

    state[t] = state[t-1] * STEP + token[t] + 1          all modulo 2^64
    word[t, r] = state[t] * FACTOR[r]
    logits after t = one table of noise, rolled by a hash of the sum over mix(state[0..t])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.model_config import UnsupportedModel
from services.engine.native.attention import ForwardBatch

Words = npt.NDArray[np.uint64]

_BITS: Final = 1 << 64
_STEP: Final = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_UNSTEP: Final = pow(_STEP, -1, _BITS)
_NOISE_SCALE: Final = 3.0  # of the logits: sampling at temperature 1 draws among some dozens of tokens
_SEED: Final = 20261121


class KeyedKV:
    """The port's `Computation`, without weights. Used by one thread; `root` tells one model's KV from another's."""

    def __init__(self, vocab_size: int, root: bytes) -> None:
        """`root`: 8 bytes."""
        noise = np.random.default_rng(_SEED).standard_normal(vocab_size).astype(np.float32) * _NOISE_SCALE
        self._rolled = np.lib.stride_tricks.sliding_window_view(np.concatenate((noise, noise)), vocab_size)
        self._vocab_size = np.uint64(vocab_size)
        self._root = np.uint64(int.from_bytes(root, "little"))
        self._words: Words = np.empty((0, 0, 0, 0), np.uint64)
        self._factors: Words = np.empty(0, np.uint64)
        self._inverses: Words = self._factors
        self._powers: Words = np.ones(1, np.uint64)
        self._unpowers: Words = self._powers
        self._num_steps = 0

    @property
    def stage_seconds(self) -> Mapping[str, float]:
        """Returns nothing: nobody counts."""
        return {}

    def use_cache(self, kv_cache: Tensor) -> None:
        """Take the cache `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` as words.

        Raises `UnsupportedModel` where a token's row is no whole number of them.
        """
        num_blocks, block_size, row_bytes = kv_cache.shape[0], kv_cache.shape[-2], kv_cache[0, 0, 0, 0, 0].nbytes
        if row_bytes % 8:
            raise UnsupportedModel(f"the paced engine needs heads of a multiple of 8 bytes, and these have {row_bytes}")
        raw = kv_cache.view(torch.uint8).numpy().view(np.uint64)
        self._words = raw.reshape(num_blocks, -1, block_size, row_bytes // 8)
        _, num_rows, _, num_words = self._words.shape
        self._factors = np.random.default_rng(_SEED).integers(0, _BITS, (num_rows, num_words), np.uint64) | np.uint64(1)
        inverses = [pow(int(factor), -1, _BITS) for factor in self._factors.flat]
        self._inverses = np.array(inverses, np.uint64).reshape(num_rows, num_words)

    def forward(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """Store the batch's keys and values; return float32 logits `[n, vocab_size]` of the rows asked for."""
        row, word = divmod(self._num_steps % self._factors.size, self._factors.shape[1])
        self._num_steps += 1
        plane, inverse = self._words[:, row, :, word], self._inverses[row, word]
        tables = batch.block_tables.numpy()
        self._write(batch, plane, inverse, tables)
        return torch.from_numpy(self._logits(batch, plane, inverse, tables))

    def _write(self, batch: ForwardBatch, plane: Words, inverse: np.uint64, tables: npt.NDArray[np.int32]) -> None:
        """Compute the new tokens' states from the state before each sequence's first, which its KV tells."""
        block_size = plane.shape[1]
        starts = np.array(batch.query_start)
        lengths = np.diff(starts)
        last = np.array(batch.context_lens) - lengths - 1  # position before the first new one; -1: there is none
        block_ids = tables[np.arange(len(last)), np.maximum(last, 0) // block_size]
        before = np.where(last < 0, self._root, plane[block_ids, last % block_size] * inverse)
        self._extend_powers(int(lengths.max()))
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        exponents = np.arange(starts[-1]) - starts[sequence] + 1
        # state[j] = STEP^j * (before + sum of (token[i] + 1) / STEP^i up to j), so that numpy can sum up.
        sums = np.cumsum((batch.token_ids.numpy().astype(np.uint64) + np.uint64(1)) * self._unpowers[exponents])
        sums -= np.concatenate((np.zeros(1, np.uint64), sums))[starts[:-1]][sequence]
        states = self._powers[exponents] * (before[sequence] + sums)
        slots = batch.slot_mapping.numpy()
        values = states[:, None, None] * self._factors
        self._words[slots // block_size, :, slots % block_size, :] = values

    def _logits(
        self, batch: ForwardBatch, plane: Words, inverse: np.uint64, tables: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float32]:
        """Read what the wanted rows attend to: every token of their context, this step's included."""
        wanted = batch.logits_indices.numpy()
        if not len(wanted):
            return np.empty((0, int(self._vocab_size)), np.float32)
        starts = np.array(batch.query_start)
        owner = np.searchsorted(starts, wanted, side="right") - 1  # the sequence of each row
        readers, reader_of = np.unique(owner, return_inverse=True)
        block_size = plane.shape[1]
        num_blocks = -(-np.array(batch.context_lens)[readers] // block_size)
        table = np.concatenate([tables[b, :count] for b, count in zip(readers, num_blocks, strict=True)])
        sums = np.cumsum(_mix(plane[table] * inverse))
        firsts = (np.cumsum(num_blocks) - num_blocks) * block_size
        positions = batch.positions.numpy()[wanted]
        base = np.concatenate((np.zeros(1, np.uint64), sums))[firsts]
        seen = _mix(sums[firsts[reader_of] + positions] - base[reader_of])
        return np.ascontiguousarray(self._rolled[(seen % self._vocab_size).astype(np.int64)])

    def _extend_powers(self, exponent: int) -> None:
        while len(self._powers) <= exponent:
            self._powers = np.append(self._powers, self._powers * self._powers[-1] * np.uint64(_STEP))
            self._unpowers = np.append(self._unpowers, self._unpowers * self._unpowers[-1] * np.uint64(_UNSTEP))


def _mix(values: Words) -> Words:
    """Spread every bit over all of them: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
