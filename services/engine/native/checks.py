"""Refuses requests whose token ids the model does not have, or whose limits leave it nothing to say."""

from __future__ import annotations

from collections.abc import Sequence

from services.engine import api
from services.engine.api import InvalidRequest, SamplingParams


def check_tokens(request: api.Request, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
    """Raises `InvalidRequest`, which names the parameter."""
    _check_token_ids("prompt", request.prompt_token_ids, vocab_size)
    _check_token_ids("resumed_token_ids", request.resumed_token_ids, vocab_size)
    sampling = request.sampling
    _check_token_ids("logit_bias", tuple(sampling.logit_bias), vocab_size)
    _check_token_ids("allowed_token_ids", sampling.allowed_token_ids, vocab_size)
    _check_token_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_allows_any(sampling, eos_token_ids, vocab_size)


def _check_token_ids(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(param, f"token id {wrong} is not in the vocabulary of {vocab_size}")


def _check_allows_any(sampling: SamplingParams, eos_token_ids: Sequence[int], vocab_size: int) -> None:
    if not sampling.min_tokens:
        return
    ends = sampling.ends(eos_token_ids)
    if sampling.allowed_token_ids and ends.issuperset(sampling.allowed_token_ids):
        raise InvalidRequest("allowed_token_ids", "min_tokens forbids all of them, they end the output")
    if len(ends) >= vocab_size:
        raise InvalidRequest("stop_token_ids", "min_tokens forbids all of them, which is the whole vocabulary")
