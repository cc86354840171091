"""Keeps some of the workers' seats from a client that could take all, for others that have used some lately.

Sequences of one client start and end together. Where they sit in every place of a batch, fairness in the queue helps
nobody: the next client's turn comes when the batch has ended. So as many seats are kept free of one client as the
others together have wanted at a time, in the last seconds, and a share of all at most. While nobody else asks, one
client may have them all. Pure: the clock is the caller's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

_SPAN_S = 5.0
"""What the others have wanted is remembered for one to two of these."""


class Seats:
    """Who has how many sequences at one model's workers, and how many each had or waited for at a time lately."""

    def __init__(self, client_share: float, clock: Callable[[], float]) -> None:
        """`client_share`: of all seats, what one client may have in any case."""
        self._client_share = client_share
        self._clock = clock
        self._held: Counter[str] = Counter()
        self._wanted: Counter[str] = Counter()  # held and waited for
        self._most: Counter[str] = Counter()  # wanted at a time, in this span
        self._most_before: Counter[str] = Counter()  # in the one before
        self._span_began_s = clock()

    def want(self, client: str, num_sequences: int) -> None:
        """So many more are asked for."""
        self._turn()
        self._wanted[client] += num_sequences
        self._most[client] = max(self._most[client], self._wanted[client])

    def take(self, client: str) -> None:
        """One of those asked for has been given a seat."""
        self._held[client] += 1

    def leave(self, client: str, num_held: int, num_waiting: int = 0) -> None:
        """So many have ended, or wait no more."""
        for counts, num in ((self._held, num_held), (self._wanted, num_held + num_waiting)):
            counts[client] -= num
            if not counts[client]:
                del counts[client]

    def has_enough(self, client: str, num_seats: float) -> bool:
        """Whether the client is to leave the rest of `num_seats` to others."""
        held = self._held[client]
        if held < self._client_share * num_seats:
            return False
        self._turn()
        wanted = max(most.total() - most[client] for most in (self._most, self._most_before))
        return wanted > 0 and held >= num_seats - min(wanted, math.floor((1 - self._client_share) * num_seats))

    def _turn(self) -> None:
        spans = (self._clock() - self._span_began_s) // _SPAN_S
        if spans >= 1:
            self._most_before = self._most if spans == 1 else Counter()
            self._most = Counter(self._wanted)  # who waits still wants what it waits for
            self._span_began_s += spans * _SPAN_S
