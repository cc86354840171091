"""Holds the requests that a fleet is planned for: when, how long, and which parts of prompts are equal. No text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kvstore.block import BlockHash, hash_blocks, namespace

FINGERPRINT = "planned"
"""Of the model that all workers of a simulation serve."""

_ROOT = namespace(FINGERPRINT)
_TOKEN_IDS = 1 << 31
_SPREAD = 0x9E3779B97F4A7C15  # odd: different blocks begin at different places


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request, lengths in the tokens that are simulated."""

    at_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...]
    """Of the trace's blocks that the prompt is made of, in order: equal ones are equal tokens."""


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their times."""

    requests: Sequence[PlannedRequest]
    tokens_per_block: int
    """Of a trace's block. `block_ids` of a request hold at least as many tokens as its prompt."""
    description: str = ""

    @cached_property
    def span_s(self) -> float:
        """Of the arrivals: as many gaps as requests, so that their number over it is the rate."""
        num = len(self.requests)
        if num < 2:
            return 1.0
        return max(self.requests[-1].at_s - self.requests[0].at_s, 1e-9) * num / (num - 1)

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.requests) / self.span_s

    def prompt(self, request: PlannedRequest) -> list[int]:
        """The prompt's token ids: such that equal blocks are equal, and no others."""
        token_ids: list[int] = []
        for block_id in request.block_ids:
            start = (block_id + 1) * _SPREAD % (1 << 64) % (_TOKEN_IDS - self.tokens_per_block)
            token_ids.extend(range(start, start + self.tokens_per_block))
            if len(token_ids) >= request.num_prompt_tokens:
                break
        del token_ids[request.num_prompt_tokens :]
        return token_ids


def hashes_of(token_ids: Sequence[int], block_size: int) -> list[BlockHash]:
    """The identities of a prompt's full blocks, as workers and routers know them."""
    return hash_blocks(_ROOT, token_ids, block_size)
