"""Moves bytes of blocks between two pools: one small interface, one contract suite.

The backends are loaded by `make_transports` alone, when they are asked for."""

from kvstore.transport.base import Link, LinkPeer, Transport
from kvstore.transport.buffers import region, words_of
from kvstore.transport.marks import STEP_BYTES, Marked, mark_pieces, mark_run, num_left
from kvstore.transport.select import choose, make_transports

__all__ = [
    "STEP_BYTES",
    "Link",
    "LinkPeer",
    "Marked",
    "Transport",
    "choose",
    "make_transports",
    "mark_pieces",
    "mark_run",
    "num_left",
    "region",
    "words_of",
]
