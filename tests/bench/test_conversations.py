"""The benches' conversations share prefixes, and their yardstick counts hits as the server does."""

from __future__ import annotations

from itertools import pairwise

from loadtest.plan import PromptMaker, Scale
from tests.bench.conversations import infinite_cache_hits, make_conversations


def test_the_infinite_cache_has_whole_blocks_of_what_came_before() -> None:
    prompt = list(range(100))
    assert infinite_cache_hits([prompt], 32) == 0
    assert infinite_cache_hits([prompt, prompt], 32) == 96
    assert infinite_cache_hits([prompt, [*prompt[:40], 0]], 32) == 32
    assert infinite_cache_hits([prompt[:64], prompt[:64]], 32) == 63, "the last token is always computed"


def test_made_up_conversations_share_prefixes() -> None:
    requests = make_conversations(200, seed=0)
    maker = PromptMaker(Scale(32 / 512, 10_000, 100), range(100, 2000), seed=0)
    prompts = [maker.tokens(each)[:3000] for each in requests]
    assert 0.3 < infinite_cache_hits(prompts, 32) / sum(map(len, prompts)) < 0.95
    assert all(left.at_s <= right.at_s for left, right in pairwise(requests))
