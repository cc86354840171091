"""Turns token ids into text piece by piece; the pieces join to what decoding all at once gives.

A character may spread over several tokens and is held back until its last byte is there. `StopMatcher` behind it cuts
the text at the first stop string and never lets a part of one out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# Where so many tokens have made no whole text the bytes are broken, and are shown as such, ...
_MOST_PENDING_TOKENS = 32
# ... but for the last ones, which may be the beginning of a character: it has four bytes at most.
_MOST_UNFINISHED_TOKENS = 3
# Of a prompt's end so many are looked at.
_FEWEST_PROMPT_TOKENS, _MOST_PROMPT_TOKENS = 4, 24


class Detokenizer:
    """Text of a growing token sequence, by the library's `DecodeStream`. The cost per token does not grow with it.

    The stream has three faults, which are mended here:
    - it decodes all tokens since its last text at each step, so endless broken bytes, or skipped special tokens, cost
      more with each (`_MOST_PENDING_TOKENS`; special tokens do not reach it);
    - it raises where bytes spoil text already given: byte fallback turns a run with one broken byte into U+FFFD;
    - it does not give what it holds back at the end.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: Collection[int], prompt: Sequence[int]) -> None:
        """`skipped`: ids that give no text. `prompt`: what the text goes on from: where a text begins, decoders strip
        the space before its first word."""
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._stream = DecodeStream(skip_special_tokens=False)
        self._context: list[int] = []  # what gave the newest text: decoders look at what is before a token
        self._pending: list[int] = []  # what came since
        self._begin_behind(prompt)

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        new = [token_id for token_id in token_ids if token_id not in self._skipped]
        if not new:
            return ""
        self._pending += new
        try:
            text: str | None = self._stream.step(self._tokenizer, new)
        except Exception:  # the library raises bare Exception
            return self._take(len(self._pending))
        if text is not None:
            self._context, self._pending = self._pending, []
            return text
        if len(self._pending) > _MOST_PENDING_TOKENS:
            return self._take(len(self._pending) - _MOST_UNFINISHED_TOKENS)
        return ""

    def flush(self) -> str:
        """Returns what was held back, with U+FFFD for unfinished characters."""
        return self._take(len(self._pending)) if self._pending else ""

    def _begin_behind(self, prompt: Sequence[int]) -> None:
        # A tail that begins inside of a character would spoil the bytes behind it.
        for num_tokens in range(_FEWEST_PROMPT_TOKENS, _MOST_PROMPT_TOKENS):
            tail = prompt[-num_tokens:]
            if "\ufffd" not in self._decode(tail):
                self.feed(tail)
                self.flush()
                return

    def _take(self, num_tokens: int) -> str:
        """The text of the first pending tokens, whole or not. A new stream goes on behind them."""
        taken, self._pending = self._pending[:num_tokens], self._pending[num_tokens:]
        text = self._decode(self._context + taken)[len(self._decode(self._context)) :]
        if not text:  # what shows nothing may yet be why the next token does: spaces where a text begins
            self._context = (self._context + taken)[-_MOST_PROMPT_TOKENS:]
        elif not text.endswith("\ufffd"):
            self._context = taken
        self._stream = DecodeStream(skip_special_tokens=False)
        for token_ids in (self._context, self._pending):
            if token_ids:
                self._stream.step(self._tokenizer, token_ids)
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


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

    def feed(self, piece: str, may_stop: bool = True) -> str:
        """The text that is safe to show. Once `matched` is set, the text has ended; not within this piece where it must
        not, but what begins here may end behind it."""
        text = self._held + piece
        best: tuple[int, int, str] | None = None
        for stop in self._stops if may_stop else ():
            start = text.find(stop, max(len(self._held) - len(stop) + 1, 0))
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
        """Returns what was held back; the text has ended without a stop string in it."""
        held, self._held = self._held, ""
        return held

    def _num_to_hold(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
