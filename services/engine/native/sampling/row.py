"""Defines what the sampler is told of one row, and what it says where there is no token."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.engine.native.sampling.library import pack_params
from services.engine.request import SamplingParams


@dataclass(frozen=True)
class SamplingRow:
    """The sampler's knowledge of one row: the parameters and the tokens so far.

    May be kept from step to step: the output is what its sequence holds when a token is sampled.
    """

    sampling: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]

    def after(self, guesses: Sequence[int]) -> SamplingRow:
        """Return the row that follows where these are put out next."""
        row = SamplingRow(self.sampling, self.prompt_token_ids, [*self.output_token_ids, *guesses])
        # What is the same for both is made but once.
        vars(row)["packed_params"] = self.packed_params
        if self.has_penalty:
            vars(row)["_tokens"] = self._tokens.copy()
        return row

    @property
    def position(self) -> int:
        """The place where the sampled token will stand."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def changes_logits(self) -> bool:
        """Whether any parameter but temperature and the filters applies."""
        sampling = self.sampling
        return bool(sampling.allowed_token_ids or sampling.logit_bias or self.forbids_ends or self.has_penalty)

    @property
    def forbids_ends(self) -> bool:
        """Whether min_tokens is not reached."""
        return len(self.output_token_ids) < self.sampling.min_tokens

    @functools.cached_property
    def has_penalty(self) -> bool:
        """Whether the tokens so far change the logits."""
        sampling = self.sampling
        return bool(sampling.repetition_penalty != 1.0 or sampling.frequency_penalty or sampling.presence_penalty)

    @functools.cached_property
    def packed_params(self) -> bytes:
        """The parameters as the C library reads them; they point into `sampling`."""
        return pack_params(self.sampling, len(self.prompt_token_ids))

    def tokens_address(self) -> int:
        """Return where prompt and output lie, int32, until the next call."""
        return self._tokens.follow(self.output_token_ids)

    @functools.cached_property
    def _tokens(self) -> _TokenArray:
        return _TokenArray(self.prompt_token_ids)


class _TokenArray:
    """A request's tokens in one array that grows with its output: a list of thousands takes long to read."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        self._num_prompt_tokens = self._num_tokens = len(prompt_token_ids)
        self._memory = np.empty(len(prompt_token_ids) + 256, dtype=np.int32)
        self._memory[: self._num_tokens] = prompt_token_ids

    def copy(self) -> _TokenArray:
        """Return another that may go on otherwise."""
        other = _TokenArray(())
        other._num_prompt_tokens, other._num_tokens = self._num_prompt_tokens, self._num_tokens
        other._memory = self._memory.copy()
        return other

    def follow(self, output_token_ids: Sequence[int]) -> int:
        """Take over what the output has gained, and return the array's address."""
        end = self._num_prompt_tokens + len(output_token_ids)
        if end > self._memory.size:
            memory = np.empty(2 * end, dtype=np.int32)
            memory[: self._num_tokens] = self._memory[: self._num_tokens]
            self._memory = memory
        self._memory[self._num_tokens : end] = output_token_ids[self._num_tokens - self._num_prompt_tokens :]
        self._num_tokens = end
        return self._memory.ctypes.data


@dataclass(frozen=True)
class NoToken:
    """No token could be had from this row; `reason` is for the request's error."""

    reason: str
