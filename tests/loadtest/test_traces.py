"""Traces become prompts in which equal blocks are equal tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.plan import PromptMaker, Scale
from loadtest.plan.prompts import word
from loadtest.plan.traces import TraceRequest, read_trace

_SCALE = Scale(32 / 512, 10_000, 100)


def maker(seed: int = 0) -> PromptMaker:
    return PromptMaker(_SCALE, range(100, 2000), seed)


def mooncake_file(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_mooncake_trace_is_read_up_to_the_number_asked_for(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"timestamp": 0, "input_length": 1000, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 1500, "input_length": 1100, "output_length": 6, "hash_ids": [0, 2, 3]},
    ]
    path = mooncake_file(tmp_path / "trace.jsonl", rows)
    assert read_trace(path, 10) == [TraceRequest(0.0, 1000, 5, (0, 1)), TraceRequest(1.5, 1100, 6, (0, 2, 3))]
    assert len(read_trace(path, 1)) == 1


def test_an_azure_trace_is_read_and_its_prompts_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,1025,109\n"
    )
    first, second = read_trace(path, 10)
    assert (first.input_length, first.output_length) == (374, 44)
    assert second.at_s - first.at_s == pytest.approx(4.314579)
    assert len(first.block_ids) == 1
    assert len(second.block_ids) == 3
    assert not set(first.block_ids) & set(second.block_ids)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1]}\n{"oops": 1}\n', "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,x,44\n", "line 2"),
        ("a,b\n1,2\n", "neither"),
    ],
)
def test_what_is_no_request_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_trace(path, 10)


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-such-file"):
        read_trace(tmp_path / "no-such-file", 10)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.integers(0, 511),
)
def test_equal_blocks_are_equal_tokens_and_others_are_not(left: list[int], right: list[int], missing: int) -> None:
    prompts = [
        maker().tokens(TraceRequest(0.0, len(blocks) * 512 - missing, 1, tuple(blocks))) for blocks in (left, right)
    ]
    for blocks, prompt in zip((left, right), prompts, strict=True):
        assert len(prompt) == round((len(blocks) * 512 - missing) / 16) or len(prompt) == 1
    for index in range(min(len(left), len(right))):
        both = [prompt[index * 32 : index * 32 + 32] for prompt in prompts]
        if len(both[0]) == len(both[1]) == 32:
            assert (both[0] == both[1]) is (left[index] == right[index])


def test_another_seed_makes_other_tokens_and_the_same_seed_the_same() -> None:
    request = TraceRequest(0.0, 1024, 1, (7, 8))
    assert maker(1).tokens(request) == maker(1).tokens(request)
    assert maker(1).tokens(request) != maker(2).tokens(request)


@given(st.integers(0, 200_000), st.integers(0, 200_000))
def test_words_are_different_for_different_tokens(left: int, right: int) -> None:
    assert (word(left) == word(right)) is (left == right)


def test_limits_cut_lengths_and_say_so() -> None:
    scale = Scale(0.5, 100, 10)
    short, long = TraceRequest(0.0, 200, 20, (1,)), TraceRequest(0.0, 500, 500, (1,))
    assert (scale.prompt_tokens(short), scale.output_tokens(short), scale.cuts(short)) == (100, 10, False)
    assert (scale.prompt_tokens(long), scale.output_tokens(long), scale.cuts(long)) == (100, 10, True)


def test_sessions_of_agents_share_what_their_rows_say(tmp_path: Path) -> None:
    path = tmp_path / "agents.jsonl"
    rows = [[0.0, 1100, 5, 0, -1, 0, 1.0], [10.0, 1600, 6, 1030, 0, 2.0, 1.0]]
    path.write_text("".join(json.dumps({"session": n, "requests": rows}) + "\n" for n in range(2)))
    first, other, second, last = read_trace(path, 10)
    assert [each.at_s for each in (first, other, second, last)] == [0.0, 5.0, 10.0, 15.0]
    assert (second.input_length, second.output_length, second.turn) == (1600, 6, 1)
    assert second.block_ids[:2] == first.block_ids[:2]  # the third block is another one from its 7th token on
    assert not set(second.block_ids[2:]) & set(first.block_ids)
    assert not set(other.block_ids) & set(first.block_ids)
    path.write_text(path.read_text() + '{"session": 2, "requests": [[0.0, 10]]}\n')
    with pytest.raises(ValueError, match="line 3: no session of an agent"):
        read_trace(path, 10)
