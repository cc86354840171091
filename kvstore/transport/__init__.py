"""Moves bytes of blocks between two pools: one small interface, one contract suite.

The backends are loaded by `make_transports` alone, when they are asked for."""

from kvstore.transport.base import Link, LinkPeer, Transport
from kvstore.transport.buffers import region, words_of
from kvstore.transport.select import choose, make_transports

__all__ = ["Link", "LinkPeer", "Transport", "choose", "make_transports", "region", "words_of"]
