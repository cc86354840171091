"""Makes up conversations for benches, and says what of them one cache without bounds would have."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from loadtest.plan import BLOCK_TOKENS, TraceRequest


def make_conversations(num_requests: int, seed: int) -> list[TraceRequest]:
    """Conversations over a few system prompts, close together: each turn repeats what came before, and adds to it.

    Denser than any published trace (70 % of the requests continue a conversation), so that a few hundred requests show
    what routing does.
    """
    rng = random.Random(seed)
    fresh: Iterator[int] = itertools.count(1)
    systems = [tuple(next(fresh) for _ in range(rng.randint(2, 8))) for _ in range(4)]
    open_chats: list[tuple[int, tuple[int, ...]]] = []
    requests: list[TraceRequest] = []
    at_s = 0.0
    while len(requests) < num_requests:
        at_s += rng.expovariate(1.0)
        if open_chats and rng.random() < 0.7:
            turn, history = open_chats.pop(rng.randrange(len(open_chats)))
        else:
            turn, history = 0, rng.choice(systems)
        blocks = (*history, *(next(fresh) for _ in range(rng.randint(1, 6))))
        requests.append(TraceRequest(at_s, len(blocks) * BLOCK_TOKENS, BLOCK_TOKENS, blocks, turn))
        if len(blocks) < 80:
            open_chats.append((turn + 1, blocks))
    return requests


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
