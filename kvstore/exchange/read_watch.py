"""Sees whether the bytes of our reads come in, whatever carries them.

A link may stand still while the control connection beside it speaks, and a slow one is to be left alone for as long as
anything comes.

    nothing to read       no byte came            a byte came, a read ended
    waits for nothing     counts                  starts to count anew
                          longer than allowed: the link stands still, and its connection ends

Before a read, words of its blocks are marked, one in 64 KiB; as bytes come, marks go. A pool on a device cannot be
looked at like that: there messages count that have ended, and one may take longer than 64 KiB would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from kvstore.block import BlockMemory, Run
from kvstore.transport import STEP_BYTES, Link, Marked, mark_pieces, mark_run, num_left, region, words_of

# Below this a link is as good as one that stands still.
_SLOWEST_BYTES_PER_S: Final = 1024 * 1024


class ReadWatch:
    """Watches the reads of one connection. Of the time between two looks at most twice the interval counts: our own
    process may have stood still."""

    def __init__(
        self, memory: BlockMemory, link: Link, num_turns: Callable[[], int | None], allowed_s: float, interval_s: float
    ) -> None:
        """`num_turns` of our own transport's thread: where it does not come round, the link is not to blame."""
        self._memory = memory
        self._link = link
        self._num_turns = num_turns
        self._allowed_s = allowed_s
        self._interval_s = interval_s
        self._marked: dict[int, Marked] = {}  # by read
        self._num_marks = 0
        self._unseen_bytes = STEP_BYTES  # what may come without being seen
        self._still_s = 0.0
        self._has_moved = False
        self._seen: tuple[float, int, int | None] | None = None  # the last look: when, messages, turns

    @property
    def is_reading(self) -> bool:
        """Whether there is anything to wait for."""
        return bool(self._marked)

    def begin(self, read_id: int, runs: Sequence[Run]) -> None:
        """Mark the blocks of a read, before it starts."""
        if not self._marked:
            self._still_s, self._seen = 0.0, None
        marked: Marked = []
        for number, run in enumerate(runs):
            if self._memory.device == "cpu":
                marked += _mark(self._memory, run, number)
            else:
                self._unseen_bytes = max(self._unseen_bytes, run.num_blocks * self._memory.block_bytes)
        self._marked[read_id] = marked
        self._num_marks += sum(words.size for words in marked)

    def end(self, read_id: int) -> None:
        """A read has ended; nothing happens where it was dropped."""
        if read_id in self._marked:
            self._has_moved = True
            self.drop(read_id)

    def drop(self, read_id: int) -> None:
        """Nobody waits for a read any more, or it has ended."""
        self._num_marks -= num_left(self._marked.pop(read_id, []))

    def look(self, now: float) -> bool:
        """Return whether bytes have come since the last time."""
        num_marks = sum(num_left(marked) for marked in self._marked.values())
        seen_at, num_messages, num_turns = self._seen or (now, 0, None)
        self._seen = now, self._link.num_messages, self._num_turns()
        has_moved = self._has_moved or num_marks < self._num_marks or self._link.num_messages > num_messages
        self._num_marks, self._has_moved = num_marks, False
        if has_moved or not self._marked:
            self._still_s = 0.0
        elif num_turns is None or num_turns != self._seen[2]:
            self._still_s += min(now - seen_at, 2 * self._interval_s)
        return has_moved

    def problem(self) -> str | None:
        """What is wrong with the link, as of the last look."""
        allowed_s = self._allowed_s + self._unseen_bytes / _SLOWEST_BYTES_PER_S
        if self._still_s <= allowed_s:
            return None
        return f"the link stands still: {len(self._marked)} reads, and no byte for {self._still_s:.1f} s"


def _mark(memory: BlockMemory, run: Run, number: int) -> Marked:
    if not memory.geometry.is_contiguous:
        regions = words_of(memory, run.local_first, run.num_blocks)
        return [marked for words in regions for marked in mark_pieces(words, number)]
    buffer = region(memory, run.local_first, run.num_blocks)
    assert isinstance(buffer, np.ndarray)
    return mark_run(buffer.view(np.uint64))
