"""How a worker's blocks come to store nodes: which chains it offers, and to which node."""

from services.worker.store.store_feed import StoreFeed

__all__ = ["StoreFeed"]
