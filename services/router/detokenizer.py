"""Token ids to text, a few at a time, so that the pieces put together are what decoding all of them at once gives.

A character may spread over several tokens; until its last byte is there, decoding shows U+FFFD. Such a tail is held
back. `StopMatcher` behind it cuts the text at the first stop string and never lets a part of one out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
# Tokens that stay in the window when it slides: enough for a character split into single bytes, and for decoders that
# treat the first token after the window's edge differently.
_KEPT_TOKENS = 12
_WINDOW_TOKENS = 32
# An unfinished character shows as at most three replacement characters, so of a longer run the rest is final.
_MOST_UNFINISHED = 3


class IncrementalDetokenizer:
    """Text of a growing token sequence. `decode` turns a list of ids into text, as `Tokenizer.decode` does.

    Each `feed` decodes a window of the last tokens and returns what is new and final. The window slides when it gets
    long, so the cost per call does not depend on the length of the sequence.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_emitted = 0  # characters of the window's text that have been returned

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        self._window.extend(token_ids)
        text = self._decode(self._window)
        final = len(text)
        if text.endswith(REPLACEMENT):
            final = len(text.rstrip(REPLACEMENT))
            if len(self._window) > _WINDOW_TOKENS:  # no character is that long: these bytes are no text
                final = max(final, len(text) - _MOST_UNFINISHED)
        new = text[self._num_emitted : final]
        self._num_emitted = max(self._num_emitted, final)
        if len(self._window) > _WINDOW_TOKENS:
            self._slide(len(text) - self._num_emitted)
        return new

    def flush(self) -> str:
        """What was held back, with U+FFFD where characters stayed unfinished. Nothing may be fed after this."""
        text = self._decode(self._window) if self._window else ""
        new = text[self._num_emitted :]
        self._num_emitted = len(text)
        return new

    def _slide(self, num_held: int) -> None:
        # The text before the window's new edge is final; count from the end, which the edge does not change.
        del self._window[:-_KEPT_TOKENS]
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
