"""Offers a worker's blocks to store nodes: chooses the chains, and the node of each."""

from services.worker.store.store_feed import StoreFeed

__all__ = ["StoreFeed"]
