"""Token ids to text, a few at a time, so that the pieces put together are what decoding all of them at once gives.

A character may spread over several tokens; until its last byte is there, decoding shows U+FFFD. Such a tail is held
back. `StopMatcher` behind it cuts the text at the first stop string and never lets a part of one out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
# The window is cut when it gets longer than this, at a point where the text was whole.
_WINDOW_TOKENS = 24
# Text that is never whole (broken bytes, or tokens that all end inside a character) is cut here, ...
_LONGEST_WINDOW_TOKENS = 64
# ... and so many tokens stay, which is enough for the characters at its end.
_KEPT_TOKENS = 12
# A character has four bytes at most, so later than this its missing bytes do not come any more, ...
_MOST_UNFINISHED_TOKENS = 8
# ... and of a run of replacement characters all but the last three are final.
_MOST_UNFINISHED = 3


class IncrementalDetokenizer:
    """Text of a growing token sequence. `decode` turns a list of ids into text, as `Tokenizer.decode` does.

    Each token decodes a window of the last tokens anew; what is new and final in it is returned. The window is cut
    where the text was whole, never inside a character: decoders with byte fallback decode a run of bytes as one, and
    make nothing of it if it begins in the middle of a character. The cost per token does not depend on the length of
    the sequence.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_emitted = 0  # characters of the window's text that have been returned
        self._whole_at = 0  # length of the window when its text was last whole

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        return "".join([self._feed_one(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """What was held back, with U+FFFD where characters stayed unfinished. Nothing may be fed after this."""
        text = self._decode(self._window) if self._window else ""
        new = text[self._num_emitted :]
        self._num_emitted = len(text)
        return new

    def _feed_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        is_whole = not text.endswith(REPLACEMENT)
        final = len(text) if is_whole else len(text.rstrip(REPLACEMENT))
        if len(self._window) - self._whole_at > _MOST_UNFINISHED_TOKENS:
            final = max(final, len(text) - _MOST_UNFINISHED)
        new = text[self._num_emitted : final]
        self._num_emitted = max(self._num_emitted, final)
        if is_whole:
            if len(self._window) > _WINDOW_TOKENS:
                self._cut(self._whole_at, num_held=0)
            self._whole_at = len(self._window)
        elif len(self._window) > _LONGEST_WINDOW_TOKENS:
            self._cut(len(self._window) - _KEPT_TOKENS, len(text) - self._num_emitted)
            self._whole_at = 0
        return new

    def _cut(self, start: int, num_held: int) -> None:
        # Count what has been returned from the end: there the text does not depend on where the window begins.
        del self._window[:start]
        self._num_emitted = max(len(self._decode(self._window)) - num_held, 0)


class StopMatcher:
    """Cuts a text that comes in pieces at the first stop string.

    "First" is the match that ends earliest, and of those the one that starts earliest: the same for every way of
    cutting the text into pieces. A tail that may yet become a stop string is held back.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """The text that is safe to show. Once `matched` is set, the text has ended."""
        text = self._held + piece
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        if best is not None:
            end, start, self.matched = best
            self._held = ""
            return text[: end if self._include_stop else start]
        keep = self._num_to_hold(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back; the text has ended without a stop string in it."""
        held, self._held = self._held, ""
        return held

    def _num_to_hold(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
