"""Holds what workers and store nodes share: the debug HTTP server, the feed of the index, metrics."""

from services.node.exchange_metrics import ExchangeMetrics
from services.node.http import DebugServer
from services.node.index_feed import IndexFeed
from services.node.index_metrics import IndexMetrics

__all__ = ["DebugServer", "ExchangeMetrics", "IndexFeed", "IndexMetrics"]
