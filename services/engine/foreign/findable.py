"""Which hashes can be found in another engine's prefix cache, and what of that has changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from kvstore.block import BlockHash
from kvstore.pool import CacheChange, CacheEvent
from services.engine.api import EngineError
from services.engine.foreign.live import is_nobodys


class Findable:
    """Told by the engine's events. Two of its blocks may have one hash: it can be found until the last is gone."""

    def __init__(self, is_there: Callable[[BlockHash], bool]) -> None:
        """`is_there`: whether the engine's cache has a block of that hash now."""
        self._is_there = is_there
        self._hashes: dict[BlockHash, None] = {}
        self._changes: list[CacheChange] = []

    def add(self, block_hash: BlockHash, parent: BlockHash | None) -> None:
        """The engine says that a block of this hash has come."""
        if block_hash not in self._hashes and not is_nobodys(block_hash) and self._is_there(block_hash):
            self._hashes[block_hash] = None
            self._changes.append(CacheChange(block_hash, CacheEvent.PUBLISHED, parent))

    def remove(self, block_hash: BlockHash) -> None:
        """The engine says that a block of this hash has gone."""
        if block_hash in self._hashes and not self._is_there(block_hash):
            del self._hashes[block_hash]
            self._changes.append(CacheChange(block_hash, CacheEvent.EVICTED))

    def peek(self, hashes: Sequence[BlockHash]) -> int:
        """Count how many of the first can be found. Any thread."""
        known = self._hashes
        return next((i for i, block_hash in enumerate(hashes) if block_hash not in known), len(hashes))

    def hashes(self) -> list[BlockHash]:
        """All that can be found. Any thread."""
        return list(self._hashes)

    def take_changes(self) -> list[CacheChange]:
        """Return what has changed since the last call."""
        changes, self._changes = self._changes, []
        return changes


def check_books(
    counts: Mapping[int, int], holders: Iterable[Iterable[int]], num_free: int, lost: Sequence[BlockHash]
) -> None:
    """Raise `EngineError` unless an engine's books agree.

    `counts`: references by block id, as the engine has them; `holders`: the blocks that each holder has one on, as
    often as it has; `lost`: hashes that were told to be findable, and are not.
    """
    held = Counter[int]()
    for block_ids in holders:
        held.update(block_ids)
    wrong = [f"block {i} has {count} references, {held[i]} are held" for i, count in counts.items() if count != held[i]]
    num_idle = sum(count == 0 for count in counts.values())
    if num_idle != num_free:
        wrong.append(f"{num_idle} blocks have no reference, {num_free} are free")
    wrong += [f"{block_hash.hex()} is told to be findable, and is not" for block_hash in lost]
    if wrong:
        raise EngineError(f"blocks: {'; '.join(wrong[:8])}")
