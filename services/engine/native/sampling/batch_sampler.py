"""Samples a batch: in one call of the C library where it is built, by torch elsewhere; the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from services.engine.native.sampling import sampler
from services.engine.native.sampling.library import NotChosen, SamplerLibrary, pack_row, usable_path, with_mass
from services.engine.native.sampling.row import NoToken, SamplingRow
from services.engine.request import SampledToken


class Sampler:
    """Samples the batches of one engine. `sampler.sample` defines what comes out."""

    def __init__(self, eos_token_ids: Sequence[int], num_threads: int, path: Path | None = None) -> None:
        """`path`: of the C library; None: torch samples."""
        self._eos_token_ids = eos_token_ids
        self._eos_index = np.array(eos_token_ids, dtype=np.int64)
        self._num_threads = num_threads
        self._library = None if path is None else SamplerLibrary(path)

    @classmethod
    def open(cls, eos_token_ids: Sequence[int], num_threads: int, device: str) -> Sampler:
        """Return the fastest for logits on `device`."""
        return cls(eos_token_ids, num_threads, usable_path() if device == "cpu" else None)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | NoToken]:
        """Choose one token per row of `logits`, float32 `[len(rows), vocab_size]`, which are left as they are."""
        if self._library is None:
            return sampler.sample(logits, rows, self._eos_token_ids)
        return sampler.describe(logits, rows, self._choose(self._library, logits.contiguous(), rows))

    def _choose(self, library: SamplerLibrary, logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
        size = sampler.padded_size(logits.shape[1])
        packed = [
            pack_row(
                row.packed_params, i, row.position, row.tokens_address() if row.has_penalty else 0, row.forbids_ends
            )
            for i, row in enumerate(rows)
        ]

        def choose(packed_rows: Sequence[bytes]) -> list[int]:
            return library.sample(logits, packed_rows, self._eos_index, size, sampler.NUM_CANDIDATES, self._num_threads)

        found = choose(packed)
        if min(found) >= 0:
            return list(found)
        if weighed := [i for i, token in enumerate(found) if token == NotChosen.NEEDS_MASS]:
            # A token hangs on how torch rounds the sum over the row.
            scaled = library.scaled(logits, [packed[i] for i in weighed], self._eos_index, size)
            masses = sampler.log_sum_exp(scaled).tolist()
            again = [with_mass(packed[i], mass) for i, mass in zip(weighed, masses, strict=True)]
            for i, token in zip(weighed, choose(again), strict=True):
                found[i] = token
        chosen = [None if token < 0 else token for token in found]
        if undecided := [i for i, token in enumerate(found) if token < NotChosen.NO_TOKEN]:
            tokens = sampler.choose(logits[undecided], [rows[i] for i in undecided], self._eos_token_ids)
            for i, token_id in zip(undecided, tokens, strict=True):
                chosen[i] = token_id
        return chosen
