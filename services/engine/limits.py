"""Says what no engine can run, and when an output has ended: the same for all of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from services.engine.request import FinishReason, InvalidRequest, Request, SamplingParams


def check_abilities(request: Request, adapters: Collection[str]) -> None:
    """Raise `InvalidRequest` for an adapter that is none of these keys, and for a mask: no engine heeds one yet."""
    if request.adapter and request.adapter not in adapters:
        there = f"there are {', '.join(adapters)}" if adapters else "there is none"
        raise InvalidRequest("model", f"adapter {request.adapter} is not here; {there}")
    if request.mask is not None:
        raise InvalidRequest("response_format", "this engine does not constrain the output by a mask")


def check_tokens(request: Request, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
    """Refuse token ids that the model does not have. Raises `InvalidRequest`, which names the parameter."""
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


def check_fits(request: Request, max_model_len: int, block_size: int, num_blocks: int) -> None:
    """Raise `InvalidRequest` if the request could never run to its end, were it alone on a pool of `num_blocks`."""
    num_prompt_tokens = request.num_prompt_tokens
    num_resumed, max_tokens = len(request.resumed_token_ids), request.sampling.max_tokens
    if num_prompt_tokens < 1:
        raise InvalidRequest("prompt", "must have at least one token")
    if request.num_context_tokens > max_model_len - 1:
        raise InvalidRequest(
            "prompt",
            f"has {request.num_context_tokens} tokens; the context of {max_model_len} must hold the output, too",
        )
    if num_resumed >= max_tokens:
        raise InvalidRequest("resumed_token_ids", f"has {num_resumed} tokens, where max_tokens is {max_tokens}")
    # The last token's KV is never computed, but its place is what lets a preempted request always come back.
    num_tokens = min(num_prompt_tokens + max_tokens, max_model_len)
    if request.hold_blocks:
        num_tokens = request.num_context_tokens + 1
    num_needed = -(-num_tokens // block_size)
    if num_needed > num_blocks:
        raise InvalidRequest(
            "max_tokens",
            f"{num_prompt_tokens} prompt tokens with at most {num_tokens - num_prompt_tokens} of output need "
            f"{num_needed} KV blocks of {block_size}; there are {num_blocks}",
        )


def end_of(
    request: Request, token_id: int, num_outputs: int, eos_token_ids: Collection[int], max_model_len: int
) -> tuple[FinishReason | None, int | None]:
    """Why output token number `num_outputs`, resumed ones counted, is the last, or None; and the stop token, if one
    ended it.
    """
    sampling = request.sampling
    if num_outputs >= sampling.min_tokens:
        if token_id in eos_token_ids and not sampling.ignore_eos:
            return FinishReason.STOP, None
        if token_id in sampling.stop_set:
            return FinishReason.STOP, token_id
    if num_outputs >= sampling.max_tokens or request.num_prompt_tokens + num_outputs >= max_model_len:
        return FinishReason.LENGTH, None
    # The first token is all that was wanted here; who continues holds the blocks.
    return (FinishReason.HANDED_OFF if request.hold_blocks else None), None
