"""Holds the scheduler's limits, from model and settings; refuses requests that can never be served."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.request import InvalidRequest, Request


@dataclass(frozen=True)
class SchedulerConfig:
    """The limits of a step and of a request."""

    block_size: int  # tokens
    max_model_len: int  # prompt and output tokens of one request
    model_fingerprint: str
    eos_token_ids: frozenset[int] = frozenset()
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_num_waiting: int = 1024
    # Rows of [vocab_size] logits that prompt logprobs may cost in one step: 256 of 152,000 are 155 MB.
    max_prompt_logprob_rows: int = 256

    @property
    def max_rows(self) -> int:
        """Requests that may run at once: each of them can then decode in every step."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill or begin."""
        return -(-num_tokens // self.block_size)


def check_fits(request: Request, config: SchedulerConfig, num_blocks: int) -> None:
    """Raise `InvalidRequest` if the request could never run to its end, were it alone on a pool of `num_blocks`."""
    num_prompt_tokens, limit = request.num_prompt_tokens, config.max_model_len
    num_resumed, max_tokens = len(request.resumed_token_ids), request.sampling.max_tokens
    if num_prompt_tokens < 1:
        raise InvalidRequest("prompt", "must have at least one token")
    if request.num_context_tokens > limit - 1:
        raise InvalidRequest(
            "prompt", f"has {request.num_context_tokens} tokens; the context of {limit} must hold the output, too"
        )
    if num_resumed >= max_tokens:
        raise InvalidRequest("resumed_token_ids", f"has {num_resumed} tokens, where max_tokens is {max_tokens}")
    # The last token's KV is never computed, but its place is what lets a preempted request always come back.
    num_tokens = min(num_prompt_tokens + max_tokens, limit)
    if request.hold_blocks:
        num_tokens = request.num_context_tokens + 1
    num_needed = config.num_blocks_for(num_tokens)
    if num_needed > num_blocks:
        raise InvalidRequest(
            "max_tokens",
            f"{num_prompt_tokens} prompt tokens with at most {num_tokens - num_prompt_tokens} of output need "
            f"{num_needed} KV blocks of {config.block_size}; there are {num_blocks}",
        )
