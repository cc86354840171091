"""Remembers which prefix was just sent to which worker, until the index says so.

So identical cold prompts of one burst follow the first of them, and the next turn of a conversation finds its worker
before the index has caught up. A memory of hints: bounded, aged, and never the reason for an error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvstore.block import BlockHash

WorkerKey = tuple[str, str]  # worker id, incarnation

_MAX_BLOCKS = 1 << 17  # of about 300 bytes each
_MAX_AGE_S = 30.0  # what is older the index knows better: it may be evicted


class RecentPrefixes:
    """Block hashes by the workers that they were sent to, the least recently sent forgotten first."""

    def __init__(self) -> None:
        self._sent: OrderedDict[BlockHash, dict[WorkerKey, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sent)

    def add(self, worker: WorkerKey, hashes: Sequence[BlockHash], now_s: float) -> None:
        """The worker has these blocks, or will have them. `now_s` never goes backwards."""
        # Last block first: the oldest entry is then a chain's last, and a chain is forgotten from its end.
        for block_hash in reversed(hashes):
            workers = self._sent.setdefault(block_hash, {})
            workers.pop(worker, None)
            workers[worker] = now_s
            # What is sent again and again never ages as a whole: its oldest worker goes, one at a time.
            oldest = next(iter(workers))
            if now_s - workers[oldest] > _MAX_AGE_S:
                del workers[oldest]
            self._sent.move_to_end(block_hash)
        while len(self._sent) > _MAX_BLOCKS:
            self._sent.popitem(last=False)

    def forget(self, worker: WorkerKey, hashes: Sequence[BlockHash]) -> None:
        """The worker did not get them after all."""
        for block_hash in hashes:
            workers = self._sent.get(block_hash)
            if workers is not None and workers.pop(worker, None) is not None and not workers:
                del self._sent[block_hash]

    def num_held(self, hashes: Sequence[BlockHash], now_s: float) -> dict[WorkerKey, int]:
        """Counts how many of the hashes, from the first on, each worker has. Cost: what the longest holder has."""
        self._expire(now_s)
        found: dict[WorkerKey, int] = {}
        following: set[WorkerKey] | None = None
        for index, block_hash in enumerate(hashes):
            workers = self._sent.get(block_hash, {})
            young = {worker for worker, sent_s in workers.items() if now_s - sent_s <= _MAX_AGE_S}
            following = young if following is None else following & young
            if not following:
                break
            found.update(dict.fromkeys(following, index + 1))
        return found

    def _expire(self, now_s: float) -> None:
        while self._sent:
            workers = next(iter(self._sent.values()))
            if now_s - max(workers.values()) <= _MAX_AGE_S:
                return
            self._sent.popitem(last=False)
