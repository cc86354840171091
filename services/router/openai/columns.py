"""Holds a large answer as text: the parts that grow with its tokens, as JSON, each once.

orjson's results keep the buffers that they were written in, 8 KiB for a position's twenty alternatives. So what is kept
of them is copied, and a whole answer is written with holes, which are sent in their places without having been joined.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import orjson

_HOLE = b"\0"  # JSON has none


class Column:
    """A list of JSON values, as its text; it has the memory of that and no more."""

    def __init__(self) -> None:
        self.text = bytearray()
        """Without the brackets."""

    def add(self, value: bytes | bytearray) -> None:
        """One that is JSON already."""
        if self.text:
            self.text += b","
        self.text += value

    def extend(self, later: Column) -> None:
        """Takes over those of a later piece."""
        if not self.text:
            self.text = later.text
        elif later.text:
            self.add(later.text)


Columns = dict[str, Column]
"""The lists of a field of an answer, by their names in it."""


def columns(names: Sequence[str]) -> Columns:
    """Empty ones."""
    return {name: Column() for name in names}


def default(value: object) -> object:
    """What orjson makes of a column or of token ids that are packed."""
    if isinstance(value, Column):
        return orjson.Fragment(b"[" + value.text + b"]")
    if isinstance(value, array):
        return value.tolist()
    raise TypeError(type(value).__name__)


def in_pieces(payload: dict[str, object]) -> list[bytes | bytearray]:
    """The payload as JSON, whose columns are not copied."""
    texts: list[bytearray] = []

    def hole(value: object) -> object:
        if not isinstance(value, Column):
            return default(value)
        texts.append(value.text)
        return orjson.Fragment(b"[" + _HOLE + b"]")

    first, *others = orjson.dumps(payload, default=hole).split(_HOLE)
    pieces: list[bytes | bytearray] = [first]
    for text, other in zip(texts, others, strict=True):
        pieces += (text, other)
    return pieces
