"""Holds the scheduler's limits, from model and settings."""

from __future__ import annotations

from dataclasses import dataclass


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
