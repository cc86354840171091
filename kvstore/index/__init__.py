"""The prefix index: keeps in Redis, as hints, which process holds which blocks.

A writer per holder, a reader per router or worker; who is asked for a block validates the hint."""

from kvstore.index.entries import Holding, Tier
from kvstore.index.reader import IndexReader
from kvstore.index.session import IndexObserver, ResyncReason
from kvstore.index.writer import IndexWriter

__all__ = ["Holding", "IndexObserver", "IndexReader", "IndexWriter", "ResyncReason", "Tier"]
