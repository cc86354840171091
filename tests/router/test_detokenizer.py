"""Streaming text equals the text of all tokens at once, whatever the text and however the tokens are cut."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from services.router.text import StopMatcher
from services.router.text.detokenizer import Detokenizer
from tests.router.tiny_model import byte_fallback_tokenizer, byte_level_tokenizer

TEXT = st.text(st.characters(codec="utf-8"), max_size=60) | st.text("hello wrd  日🙂é\n", max_size=60)
SPACES = decoders.Replace("▁", " ")
DECODERS = {
    "llama": decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace": decoders.Metaspace(prepend_scheme="first"),
    "metaspace-never": decoders.Metaspace(prepend_scheme="never"),
    "fallback-metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]),
    "wordpiece": decoders.WordPiece(),
    "bpe-suffix": decoders.BPEDecoder(),
    "none": None,
}
KINDS = ("byte-level", *DECODERS)


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "byte-level":
        return byte_level_tokenizer()
    definition = json.loads(byte_fallback_tokenizer().to_str())
    tokenizer = Tokenizer.from_str(json.dumps({**definition, "decoder": None}))
    if DECODERS[kind] is not None:
        tokenizer.decoder = DECODERS[kind]
    return tokenizer


def cut(items, sizes):
    """Cuts a sequence into pieces of these sizes, the last one taking the rest."""
    start = 0
    for size in sizes:
        yield items[start : start + size]
        start += size
    yield items[start:]


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def streamed(tokenizer: Tokenizer, token_ids, sizes, skip_special_tokens=True, prompt=()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, special_ids(tokenizer) if skip_special_tokens else (), prompt)
    pieces = [detokenizer.feed(piece) for piece in cut(token_ids, sizes)]
    return [*pieces, detokenizer.flush()]


@settings(max_examples=60, deadline=None)
@given(text=TEXT, sizes=st.lists(st.integers(1, 5), max_size=60))
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_add_up_to_the_text(kind, text, sizes):
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(streamed(tokenizer, token_ids, sizes)) == tokenizer.decode(token_ids)


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.integers(0, 10**6), max_size=100), sizes=st.lists(st.integers(1, 5), max_size=80))
@example(numbers=[1] * 50 + [263, 1, 263], sizes=[1] * 60)  # special tokens, then a word with a space before it
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_add_up_to_the_text_of_arbitrary_tokens(kind, numbers, sizes):
    """Broken UTF-8, special tokens and ids without a token included: models do generate them."""
    tokenizer = tokenizer_of(kind)
    token_ids = [number % (tokenizer.get_vocab_size() + 2) for number in numbers]
    for skip in (True, False):
        text = "".join(streamed(tokenizer, token_ids, sizes, skip))
        whole = tokenizer.decode(token_ids, skip_special_tokens=skip)
        if kind == "byte-level" or "\ufffd" not in whole:
            assert text == whole
        else:
            # Byte fallback decodes a run of bytes as one: a broken one at its end voids what was shown of it.
            rest = iter(text)
            assert all(character in rest for character in whole if character != "\ufffd")


@settings(max_examples=60, deadline=None)
@given(text=TEXT, num_prompt_tokens=st.integers(1, 40), sizes=st.lists(st.integers(1, 5), max_size=60))
@example(text="hello world", num_prompt_tokens=1, sizes=[])
@example(text="  ", num_prompt_tokens=1, sizes=[])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_goes_on_from_its_prompt(kind, text, num_prompt_tokens, sizes):
    """So that a space before its first word stays, which decoders strip where a text begins."""
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    prompt, answer = token_ids[:num_prompt_tokens], token_ids[num_prompt_tokens:]
    if "\ufffd" not in tokenizer.decode(prompt):
        pieces = streamed(tokenizer, answer, sizes, prompt=prompt)
        assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode(token_ids)


def test_no_space_is_lost_behind_tokens_that_do_not_show():
    tokenizer = tokenizer_of("llama")
    hello, special, world = (tokenizer.token_to_id(token) for token in ("▁hello", "<s>", "▁world"))
    token_ids = [hello, *[special] * 100, world]
    assert "".join(streamed(tokenizer, token_ids, [1] * 200)) == "hello world"


def test_no_replacement_character_before_a_character_is_whole():
    tokenizer = byte_level_tokenizer()
    token_ids = tokenizer.encode("日本🙂", add_special_tokens=False).ids
    assert len(token_ids) > 3  # else nothing is split
    pieces = streamed(tokenizer, token_ids, [1] * len(token_ids))
    assert "".join(pieces) == "日本🙂"
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_shows_at_the_end_only():
    tokenizer = byte_level_tokenizer()
    token_ids = tokenizer.encode("🙂", add_special_tokens=False).ids
    *before, last = streamed(tokenizer, token_ids[:-1], [1] * 4)
    assert "".join(before) == ""
    assert set(last) == {"\ufffd"}


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_endless_broken_bytes_are_shown_in_time_and_a_character_behind_them_is_whole(kind):
    tokenizer = tokenizer_of(kind)
    crab = tokenizer.encode("\U0001f980", add_special_tokens=False).ids[-4:]
    for num_broken in range(450, 520):
        detokenizer = Detokenizer(tokenizer, (), ())
        shown = "".join(detokenizer.feed(crab[:1]) for _ in range(num_broken))
        assert num_broken - 40 < len(shown) < num_broken
        shown += "".join(detokenizer.feed([token_id]) for token_id in crab)
        text = shown + detokenizer.flush()
        if kind == "byte-level":
            assert text == tokenizer.decode([*crab[:1] * num_broken, *crab])
        assert len(detokenizer._pending) == 0


def test_what_is_held_is_bounded_whatever_comes():
    tokenizer = tokenizer_of("byte-level")
    broken = tokenizer.encode("\U0001f980", add_special_tokens=False).ids[0]
    for token_id in (broken, tokenizer.token_to_id("<s>"), tokenizer.get_vocab_size() + 1, 300):
        detokenizer = Detokenizer(tokenizer, {tokenizer.token_to_id("<s>")}, ())
        for _ in range(1000):
            detokenizer.feed([token_id])
            assert len(detokenizer._context) + len(detokenizer._pending) < 70


# ---- stop strings ---------------------------------------------------------------


def truncated(text: str, stops: list[str], include: bool, num_passed: int = 0) -> str:
    """The oracle: the match that ends first behind what is passed, and of those the one that starts first."""
    starts = [(start, stop) for stop in stops for start in range(len(text)) if text.startswith(stop, start)]
    matches = [(start + len(stop), start) for start, stop in starts if start + len(stop) > num_passed]
    if not matches:
        return text
    end, start = min(matches)
    return text[: end if include else start]


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("abc", max_size=40),
    stops=STOPS,
    sizes=st.lists(st.integers(1, 6), max_size=40),
    include=st.booleans(),
    num_passing=st.integers(0, 4),
)
def test_any_cutting_gives_the_same_truncation(text, stops, sizes, include, num_passing):
    """Whatever the first pieces have in them, which must not stop; a stop string that begins there may end later."""
    matcher, pieces = StopMatcher(stops, include), list(cut(text, sizes))
    num_passed = sum(map(len, pieces[:num_passing]))
    expected = truncated(text, stops, include, num_passed)
    shown = ""
    for index, piece in enumerate(pieces):
        shown += matcher.feed(piece, may_stop=index >= num_passing)
        # Nothing that shows is ever taken back, so at every moment it is a prefix of the answer.
        assert expected.startswith(shown)
        if matcher.matched:
            break
    if not matcher.matched:
        shown += matcher.flush()
    assert shown == expected
    assert (matcher.matched is not None) == any(
        text.startswith(stop, start) and start + len(stop) > num_passed for stop in stops for start in range(len(text))
    )


def test_only_what_may_become_a_stop_string_is_held_back():
    matcher = StopMatcher(["<end>"])
    assert matcher.feed("hello <") == "hello "
    assert matcher.feed("em>") == "<em>"
    assert matcher.feed("x<en") == "x"
    assert matcher.feed("d>tail") == ""
    assert matcher.matched == "<end>"
