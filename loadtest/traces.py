"""Request traces for prefix studies: lengths and block identities, no text.

Mooncake's JSONL (github.com/kvcache-ai/Mooncake, FAST25-release/traces) has a line per request: `timestamp` in ms,
`input_length` and `output_length` in tokens, and `hash_ids`, one per 512 tokens, equal where the tokens are equal.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TraceRequest:
    """One request: when it comes (seconds from the start), and the identities of its prompt's blocks, in order."""

    at_s: float
    block_ids: tuple[int, ...]


def read_mooncake(path: Path, num_requests: int) -> list[TraceRequest]:
    """The first requests of a Mooncake trace. Raises ValueError naming the line that is none."""
    requests = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(requests) == num_requests:
                break
            try:
                row = json.loads(line)
                requests.append(TraceRequest(row["timestamp"] / 1000, tuple(map(int, row["hash_ids"]))))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no request of a Mooncake trace: {error}") from error
    return requests


def make_conversations(num_requests: int, seed: int) -> list[TraceRequest]:
    """Conversations over a few system prompts: each turn repeats what came before, and adds to it."""
    rng = random.Random(seed)
    fresh: Iterator[int] = iter(range(1, 1 << 30))
    systems = [tuple(next(fresh) for _ in range(rng.randint(2, 8))) for _ in range(4)]
    open_chats: list[tuple[int, ...]] = []
    requests: list[TraceRequest] = []
    at_s = 0.0
    while len(requests) < num_requests:
        at_s += rng.expovariate(1.0)
        if open_chats and rng.random() < 0.7:
            history = open_chats.pop(rng.randrange(len(open_chats)))
        else:
            history = rng.choice(systems)
        prompt = (*history, *(next(fresh) for _ in range(rng.randint(1, 6))))
        requests.append(TraceRequest(at_s, prompt))
        if len(prompt) < 80:
            open_chats.append(prompt)
    return requests


def prompt_of(request: TraceRequest, tokens_per_block: int, max_tokens: int, token_ids: Sequence[int]) -> list[int]:
    """Tokens for a request: equal trace blocks are equal tokens, whatever request they stand in."""
    tokens: list[int] = []
    for block_id in request.block_ids:
        rng = random.Random(block_id)
        tokens += rng.choices(token_ids, k=tokens_per_block)
        if len(tokens) >= max_tokens:
            break
    return tokens[:max_tokens]


def infinite_cache_hits(prompts: Sequence[Sequence[int]], block_size: int) -> int:
    """Prompt tokens that one shared cache without bounds would have, prompt after prompt.

    As the server counts: whole blocks, and the last token of a prompt is always computed.
    """
    known: set[tuple[int, ...]] = set()
    num_hits = 0
    for prompt in prompts:
        num_cached = 0
        is_hit = True
        for end in range(block_size, len(prompt) + 1, block_size):
            prefix = tuple(prompt[:end])
            is_hit = is_hit and prefix in known
            num_cached = end if is_hit else num_cached
            known.add(prefix)
        num_hits += min(num_cached, len(prompt) - 1)
    return num_hits
