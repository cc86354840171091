"""Guesses what follows a text from the text itself: an n-gram that stood there before was followed by something.

Prompt lookup decoding (Saxena 2023), as vLLM's `ngram`. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class PromptLookup:
    """One text that grows at its end, prompt and output: 4 bytes a token."""

    def __init__(self, min_tokens: int, max_tokens: int) -> None:
        """N-grams of `min_tokens` to `max_tokens` are looked for, the longest first."""
        self._min_tokens, self._max_tokens = min_tokens, max_tokens
        self._tokens: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self._num_tokens = 0

    def guess(self, token_ids: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """The `num_tokens` that follow `token_ids` by the newest place where the longest n-gram at its end stood.

        None, where it has no such n-gram. `token_ids` begin with those of the call before. Where that place is so near
        to the end that what followed it ends, it goes on in what is guessed: a text that repeats itself goes on to.
        """
        self._grow(token_ids)
        place = self._find()
        if place is None:
            return ()
        followed: list[int] = self._tokens[place : min(place + num_tokens, self._num_tokens)].tolist()
        period = self._num_tokens - place
        while len(followed) < num_tokens:
            followed.append(followed[len(followed) - period])
        return tuple(followed)

    def _grow(self, token_ids: Sequence[int]) -> None:
        if len(token_ids) > len(self._tokens):
            room = np.empty(max(1024, 2 * len(token_ids)), np.int32)
            room[: self._num_tokens] = self._tokens[: self._num_tokens]
            self._tokens = room
        self._tokens[self._num_tokens : len(token_ids)] = token_ids[self._num_tokens :]
        self._num_tokens = len(token_ids)

    def _find(self) -> int | None:
        """Where the token stands that followed the newest of the longest n-grams.

        A pass over the text for its last token alone, then one over the places found for each token before it: 10 us
        for 10,000 tokens.
        """
        tokens, end = self._tokens, self._num_tokens
        places = np.flatnonzero(tokens[: end - 1] == tokens[end - 1]) + 1
        length = 1
        while places.size and length < self._max_tokens:
            longer = places[places > length]
            longer = longer[tokens[longer - length - 1] == tokens[end - length - 1]]
            if not longer.size:
                break
            places, length = longer, length + 1
        return int(places[-1]) if places.size and length >= self._min_tokens else None
