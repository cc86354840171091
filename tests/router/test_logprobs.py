"""The forms of log probabilities."""

from __future__ import annotations

import json
import math

import orjson
import pytest
from tandem.v1 import worker_pb2 as pb

from services.router.openai.columns import columns, default
from services.router.openai.logprobs import (
    CompletionLogprobs,
    TokenNamer,
    chat_position,
    prompt_position,
)
from tests.router.fake_worker import position


def piece(logprobs, token_ids, positions):
    to = columns(CompletionLogprobs.FIELDS)
    for token_id, each in zip(token_ids, positions, strict=True):
        logprobs.add(token_id, each, to)
    return json.loads(orjson.dumps(to, default))


def formatted(tokenizer, token_ids, skip_special_tokens=True):
    logprobs = CompletionLogprobs(tokenizer, False, skip_special_tokens)
    return piece(logprobs, token_ids, [position(token_id, 2) for token_id in token_ids])


@pytest.mark.parametrize("text", ["Hello world!", "naïve 你好 🙂 end", "🙂🙂"])
def test_offsets_point_to_where_a_token_begins(tokenizer, text):
    (token_ids,) = tokenizer.encode([text], False)
    offsets = formatted(tokenizer, token_ids)["text_offset"]
    for index, offset in enumerate(offsets):
        before = b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids[:index])
        assert text[:offset] == before.decode("utf-8", "ignore")


def test_offsets_count_on_and_skip_what_does_not_show(tokenizer):
    (token_ids,) = tokenizer.encode(["ab</s>cd"], False)
    whole = formatted(tokenizer, token_ids)["text_offset"]
    piecewise = CompletionLogprobs(tokenizer, False, True)
    pieces = [piece(piecewise, [token_id], [position(token_id, 1)])["text_offset"] for token_id in token_ids]
    assert [offset for offsets in pieces for offset in offsets] == whole
    assert whole[-1] < 4
    assert formatted(tokenizer, token_ids, skip_special_tokens=False)["text_offset"][-1] >= 6


def test_the_first_prompt_token_has_none(tokenizer):
    logprobs = CompletionLogprobs(tokenizer, False, True)
    answer = piece(logprobs, [300, 301], [pb.PositionLogprobs(), position(301, 1)])
    assert answer["token_logprobs"] == [None, -0.5]
    assert answer["top_logprobs"] == [None, {tokenizer.token_text(301): -0.5}]


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1e30])
def test_what_json_cannot_say_is_very_unlikely(tokenizer, value):
    impossible = pb.PositionLogprobs(chosen=pb.TokenLogprob(token_id=300, logprob=value, rank=9))
    assert piece(CompletionLogprobs(tokenizer, False, True), [300], [impossible])["token_logprobs"] == [-9999.0]


def test_the_chosen_token_is_always_among_the_alternatives_of_a_completion(tokenizer):
    unlikely = position(300, 2)
    unlikely.chosen.token_id, unlikely.chosen.logprob = 310, -7
    answer = piece(CompletionLogprobs(tokenizer, False, True), [310], [unlikely])
    assert answer["top_logprobs"][0][tokenizer.token_text(310)] == -7


def test_the_chat_form_has_bytes_and_as_many_alternatives_as_asked(tokenizer):
    (token_ids,) = tokenizer.encode(["é"], False)
    namer = TokenNamer(tokenizer, False)
    content = [json.loads(chat_position(namer, token_id, position(token_ids[0], 4), 2)) for token_id in token_ids]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "é".encode()
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


def test_prompt_logprobs_are_keyed_by_token_id(tokenizer):
    assert json.loads(prompt_position(tokenizer, pb.PositionLogprobs())) is None
    second = json.loads(prompt_position(tokenizer, position(300, 2)))
    assert second == {
        "300": {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.token_text(300)},
        "301": {"logprob": -1.0, "rank": 2, "decoded_token": tokenizer.token_text(301)},
    }
