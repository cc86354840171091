"""Traces become prompts in which equal blocks are equal tokens; the yardstick counts as the server does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest.traces import infinite_cache_hits, make_conversations, prompt_of, read_mooncake


def test_a_mooncake_trace_is_read_up_to_the_number_asked_for(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 1500, "input_length": 1100, "output_length": 5, "hash_ids": [0, 2, 3]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    requests = read_mooncake(path, 10)
    assert [(each.at_s, each.block_ids) for each in requests] == [(0.0, (0, 1)), (1.5, (0, 2, 3))]
    assert len(read_mooncake(path, 1)) == 1


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "hash_ids": [1]}\n{"oops": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_mooncake(path, 10)


def test_equal_blocks_are_equal_tokens_and_others_are_not() -> None:
    first, second = make_conversations(50, seed=1)[:2]
    prompts = [prompt_of(each, 32, 10_000, range(100, 2000)) for each in (first, second)]
    num_shared = sum(1 for left, right in zip(first.block_ids, second.block_ids, strict=False) if left == right)
    assert len(prompts[0]) == 32 * len(first.block_ids)
    assert prompts[0][: 32 * num_shared] == prompts[1][: 32 * num_shared]
    assert prompts[0][32 * num_shared : 32 * num_shared + 32] != prompts[1][32 * num_shared : 32 * num_shared + 32]


def test_the_infinite_cache_has_whole_blocks_of_what_came_before() -> None:
    prompt = list(range(100))
    assert infinite_cache_hits([prompt], 32) == 0
    assert infinite_cache_hits([prompt, prompt], 32) == 96
    assert infinite_cache_hits([prompt, [*prompt[:40], 0]], 32) == 32
    assert infinite_cache_hits([prompt[:64], prompt[:64]], 32) == 63, "the last token is always computed"


def test_made_up_conversations_share_prefixes() -> None:
    requests = make_conversations(200, seed=0)
    prompts = [prompt_of(each, 32, 3000, range(100, 2000)) for each in requests]
    assert 0.3 < infinite_cache_hits(prompts, 32) / sum(map(len, prompts)) < 0.95
    assert [each.at_s for each in requests] == sorted(each.at_s for each in requests)
