"""Says whether two workers compute alike, by the names of their arithmetic. Pure.

A sequence that goes on at another worker has the same tokens for certain only where that one computes as the first did,
and each of them the same bits in any company (`is_exact` in its record: C kernels do, torch does not); elsewhere a
rounding may tip a choice between two nearly equal tokens, and from there on the text is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class _Computing(Protocol):
    @property
    def numerics(self) -> str:
        """The name of its arithmetic; empty where it says none."""


C = TypeVar("C", bound=_Computing)


def is_alike(before: str, *after: str) -> bool:
    """Whether what was begun under one name goes on under the same; of the unnamed nobody knows.

    `after`: of everybody who computes a part of it from then on, or may have made KV that it rests on.
    """
    return bool(before) and all(each == before for each in after)


def prefer_equal(numerics: str, candidates: Sequence[C]) -> Sequence[C]:
    """Return the candidates of that name, if there are any, else all: an inexact place is better than none."""
    equal = [each for each in candidates if is_alike(numerics, each.numerics)]
    return equal or candidates
