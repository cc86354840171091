"""How bytes of blocks move between two pools: one small interface, one contract suite.

The backends are loaded by `make_transports` alone, when they are asked for."""

from kvstore.transport.base import Link, LinkPeer, Run, Transport, coalesce
from kvstore.transport.select import choose, make_transports

__all__ = ["Link", "LinkPeer", "Run", "Transport", "choose", "coalesce", "make_transports"]
