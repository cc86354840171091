"""Makes prompts from block identities: equal trace blocks become equal tokens in every request."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.plan.traces import BLOCK_TOKENS, TraceRequest

_SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ve", "wi", "yo", "zu", "ka")


@dataclass(frozen=True)
class Scale:
    """Turns a trace's lengths into the lengths that are sent.

    All lengths are multiplied by `factor`; what is then longer than a limit is cut to it, and counted by the caller.
    """

    factor: float
    max_prompt_tokens: int
    max_output_tokens: int

    def prompt_tokens(self, request: TraceRequest) -> int:
        return min(self.max_prompt_tokens, max(1, round(request.input_length * self.factor)))

    def output_tokens(self, request: TraceRequest) -> int:
        return min(self.max_output_tokens, max(1, round(request.output_length * self.factor)))

    def cuts(self, request: TraceRequest) -> bool:
        """Whether a limit makes this request shorter than its share."""
        return (
            round(request.input_length * self.factor) > self.max_prompt_tokens
            or round(request.output_length * self.factor) > self.max_output_tokens
        )


class PromptMaker:
    """Makes the tokens of prompts. Every process of a distributed run makes the same ones from the same seed."""

    def __init__(self, scale: Scale, token_ids: Sequence[int], seed: int) -> None:
        self._scale = scale
        self._tokens_per_block = max(1, round(BLOCK_TOKENS * scale.factor))
        self._token_ids = token_ids
        self._seed = seed
        self._block = functools.lru_cache(maxsize=65536)(self._make_block)

    def tokens(self, request: TraceRequest) -> list[int]:
        """The prompt's token ids. Two requests that share n whole blocks share their first n blocks of tokens."""
        num_tokens = self._scale.prompt_tokens(request)
        tokens: list[int] = []
        for block_id in request.block_ids:
            tokens += self._block(block_id)
            if len(tokens) >= num_tokens:
                break
        return tokens[:num_tokens]

    def text(self, request: TraceRequest) -> str:
        """The same as words, a word for a token, for servers or endpoints that take no token ids.

        The server's tokenizer decides how many tokens they are; its usage figures go into the records.
        """
        return " ".join(map(word, self.tokens(request)))

    def _make_block(self, block_id: int) -> tuple[int, ...]:
        rng = random.Random(self._seed << 48 ^ block_id)
        return tuple(rng.choices(self._token_ids, k=self._tokens_per_block))


def word(token_id: int) -> str:
    """A pronounceable word for a number; different numbers, different words."""
    syllables = [_SYLLABLES[token_id % 16]]
    while token_id := token_id // 16:
        syllables.append(_SYLLABLES[token_id % 16])
    return "".join(syllables)
