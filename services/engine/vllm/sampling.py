"""Says our sampling parameters in vLLM's words, and its tokens and log probabilities in ours."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from vllm import SamplingParams as VllmSamplingParams
from vllm.v1.outputs import LogprobsLists, LogprobsTensors

from services.engine.foreign import position_logprobs
from services.engine.request import PositionLogprobs, Request, SampledToken

_SEEDS: Final = 1 << 63  # its seeds are signed


def to_vllm(asked: Request, eos_token_ids: Collection[int], *, tells_prompt: bool = True) -> VllmSamplingParams:
    """Return the parameters for a request, its resumed output taken for output. Raises vLLM's `ValueError`.

    `tells_prompt` False: log probabilities of the prompt have been told by whoever computed it.

    End-of-sequence tokens are stop tokens: so there may be several, and `min_tokens` forbids all of them at first.
    """
    sampling = asked.sampling
    stops = sampling.ends(eos_token_ids)
    # Of a prompt to hand off the first token is all that is wanted.
    max_tokens = len(asked.resumed_token_ids) + 1 if asked.hold_blocks else sampling.max_tokens
    return VllmSamplingParams(
        temperature=0.0 if sampling.is_greedy else sampling.temperature,
        top_p=sampling.top_p,
        top_k=max(0, sampling.top_k),
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        allowed_token_ids=list(sampling.allowed_token_ids) or None,
        seed=None if sampling.is_greedy else sampling.seed % _SEEDS,
        max_tokens=max_tokens,
        min_tokens=min(sampling.min_tokens, max_tokens),
        stop_token_ids=sorted(stops),
        ignore_eos=True,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs if asked.wants_prompt_logprobs and tells_prompt else None,
        detokenize=False,
        skip_clone=True,
    )


def sampled_tokens(token_ids: Sequence[int], logprobs: LogprobsLists | None) -> tuple[SampledToken, ...]:
    """Return a request's new tokens, with their log probabilities where it asked for them."""
    if logprobs is None:
        return tuple(map(SampledToken, token_ids))
    return tuple(
        SampledToken(token_id, position_logprobs(ids, values, int(rank)))
        for token_id, ids, values, rank in zip(
            token_ids, logprobs.logprob_token_ids, logprobs.logprobs, logprobs.sampled_token_ranks, strict=True
        )
    )


def prompt_logprobs(tensors: LogprobsTensors) -> tuple[PositionLogprobs | None, ...]:
    """Return the log probabilities of a prompt's tokens; of the first there are none."""
    rows = zip(
        tensors.logprob_token_ids.tolist(),
        tensors.logprobs.tolist(),
        tensors.selected_token_ranks.tolist(),
        strict=True,
    )
    return (None, *(position_logprobs(ids, values, rank) for ids, values, rank in rows))
