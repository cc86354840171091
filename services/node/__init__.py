"""Holds what workers and store nodes share: the debug HTTP server, the feed of the index, metrics, the watchdog."""

from services.node.exchange_metrics import ExchangeMetrics
from services.node.http import DebugServer
from services.node.index_feed import IndexFeed
from services.node.index_metrics import IndexMetrics
from services.node.watchdog import (
    ProgressMetrics,
    Watchdog,
    hindering,
    in_words,
    loop_watch,
    transport_watches,
    watched,
)

__all__ = [
    "DebugServer",
    "ExchangeMetrics",
    "IndexFeed",
    "IndexMetrics",
    "ProgressMetrics",
    "Watchdog",
    "hindering",
    "in_words",
    "loop_watch",
    "transport_watches",
    "watched",
]
