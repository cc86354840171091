"""Streaming text equals the text of all tokens at once, whatever the text and however the tokens are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.detokenizer import IncrementalDetokenizer, StopMatcher

TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


def cut(items, sizes):
    """Cuts a sequence into pieces of these sizes, the last one taking the rest."""
    start = 0
    for size in sizes:
        yield items[start : start + size]
        start += size
    yield items[start:]


def streamed(tokenizer, token_ids, sizes, skip_special_tokens=True):
    detokenizer = IncrementalDetokenizer(tokenizer.decoder(skip_special_tokens))
    pieces = [detokenizer.feed(piece) for piece in cut(token_ids, sizes) if piece]
    return [*pieces, detokenizer.flush()]


@settings(max_examples=100, deadline=None)
@given(text=TEXT, sizes=st.lists(st.integers(1, 5), max_size=60))
@pytest.mark.parametrize("fixture", ["tokenizer", "fallback_tokenizer"])
def test_pieces_add_up_to_the_text(request, fixture, text, sizes):
    tokenizer = request.getfixturevalue(fixture)
    (token_ids,) = tokenizer.encode([text], add_special_tokens=False)
    assert "".join(streamed(tokenizer, token_ids, sizes)) == tokenizer.decode(token_ids)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 5), max_size=80))
def test_pieces_add_up_to_the_text_of_arbitrary_tokens(tokenizer, data, sizes):
    """Broken UTF-8 included: models do generate it."""
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=100))
    for skip in (True, False):
        assert "".join(streamed(tokenizer, token_ids, sizes, skip)) == tokenizer.decode(token_ids, skip)


def test_no_replacement_character_before_a_character_is_whole(tokenizer):
    (token_ids,) = tokenizer.encode(["日本🙂"], add_special_tokens=False)
    assert len(token_ids) > 3  # else nothing is split
    pieces = streamed(tokenizer, token_ids, [1] * len(token_ids))
    assert "".join(pieces) == "日本🙂"
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_shows_at_the_end_only(tokenizer):
    (token_ids,) = tokenizer.encode(["🙂"], add_special_tokens=False)
    *before, last = streamed(tokenizer, token_ids[:-1], [1] * 4)
    assert "".join(before) == ""
    assert set(last) == {"\ufffd"}


def test_endless_broken_bytes_are_shown_in_time(tokenizer):
    (unfinished,) = tokenizer.encode(["\U0001f980"], add_special_tokens=False)
    token_ids = unfinished[:1] * 500
    detokenizer = IncrementalDetokenizer(tokenizer.decoder(True))
    shown = "".join(detokenizer.feed([token_id]) for token_id in token_ids)
    assert 400 < len(shown) < 500
    assert shown + detokenizer.flush() == tokenizer.decode(token_ids)


def test_cost_per_token_does_not_grow(tokenizer):
    lengths = []

    def decode(token_ids):
        lengths.append(len(token_ids))
        return tokenizer.decode(token_ids)

    detokenizer = IncrementalDetokenizer(decode)
    (token_ids,) = tokenizer.encode(["the lazy dog " * 200], add_special_tokens=False)
    for token_id in token_ids:
        detokenizer.feed([token_id])
    assert max(lengths) < 40


# ---- stop strings ---------------------------------------------------------------


def truncated(text: str, stops: list[str], include: bool) -> str:
    """The oracle: the match that ends first, and of those the one that starts first."""
    matches = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not matches:
        return text
    end, start = min(matches)
    return text[: end if include else start]


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("abc", max_size=40), stops=STOPS, sizes=st.lists(st.integers(1, 6), max_size=40), include=st.booleans()
)
def test_any_cutting_gives_the_same_truncation(text, stops, sizes, include):
    matcher = StopMatcher(stops, include)
    shown = ""
    for piece in cut(text, sizes):
        shown += matcher.feed(piece)
        # Nothing that shows is ever taken back, so at every moment it is a prefix of the answer.
        assert truncated(text, stops, include).startswith(shown)
        if matcher.matched:
            break
    if not matcher.matched:
        shown += matcher.flush()
    assert shown == truncated(text, stops, include)
    assert (matcher.matched is not None) == any(stop in text for stop in stops)


def test_only_what_may_become_a_stop_string_is_held_back():
    matcher = StopMatcher(["<end>"])
    assert matcher.feed("hello <") == "hello "
    assert matcher.feed("em>") == "<em>"
    assert matcher.feed("x<en") == "x"
    assert matcher.feed("d>tail") == ""
    assert matcher.matched == "<end>"
