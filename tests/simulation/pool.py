"""A worker's blocks as the simulation sees them: the product's `BlockPool`, with the bytes that each block should have.

What a block holds follows from its name, so anybody can say whether it is right. A block that belongs to nobody holds
a pattern, and the pattern is looked at before the block is used again: a late byte shows.
"""

from __future__ import annotations

import enum
import hashlib
import zlib
from collections.abc import Callable, Sequence
from typing import Final

from kvstore.block import BlockHash, BlockLayout, Proof, Subject
from kvstore.errors import IntegrityError
from kvstore.pool import Block, BlockPool
from tests.pieces import flip, host_memory, read_block, write_block
from tests.proofs import KEY

LAYOUT: Final = BlockLayout(
    num_layers=1, num_kv_heads=1, block_size=2, head_dim=16, dtype="float16", model_fingerprint="51"
)
BLOCK_BYTES: Final = LAYOUT.block_bytes
_NUMS_PIECES: Final = (1, 2, 8)


class Invariant(enum.StrEnum):
    """What must hold in every run."""

    ONE_OUTCOME = "each fetch, each lease and each request has one outcome, and no error that nothing explains"
    RIGHT_BYTES = "every block that is used is right"
    CONFIRMED = "no block is used before its lease is confirmed"
    SAME_INCARNATION = "no block is taken from another start of the process that was meant"
    ONE_OWNER = "no block is owned twice"
    NO_LEAK = "no block is leaked"
    NO_LATE_BYTE = "nobody writes to a block that is not his"
    SOURCE_HELD = "no block is freed while its lease goes on"
    ABORTS_END = "an aborted fetch has its result at once"
    WAITS_END = "every wait ends"
    SERVES_AGAIN = "who is healthy serves again once faults stop"
    NO_INTERNAL_ERROR = "no error is ours"
    RIGHT_TOKENS = "every token of every stream is right, and none is missing"
    NOBODYS_WORK = "nothing of a request that has ended enters the engine"
    ONLY_PEERS = "who has not proven itself is nobody's peer"
    SERVES_ON = "while one router is away, another one serves"
    RECLAIMED = "what a router had that is gone is given back within a bound"
    NO_FALSE_ALARM = "where nothing has failed, nobody is blamed, no deadline passes, and no stream ends in an error"


class Violation(AssertionError):
    """An invariant does not hold."""

    def __init__(self, invariant: Invariant, detail: str) -> None:
        super().__init__(f"{invariant.name}: {detail}")
        self.invariant = invariant
        self.detail = detail

    def __reduce__(self) -> tuple[type[Violation], tuple[Invariant, str]]:
        return Violation, (self.invariant, self.detail)  # as reports of other processes bring it


def content_of(name: bytes) -> bytes:
    """What a block of this name holds: of its hash, or of a transfer and an index where it has none."""
    return hashlib.shake_128(name).digest(BLOCK_BYTES)


class WatchedPool:
    """`num_leased(block_id)`: how many leases of ours that are not over have the block.

    `report` notes a violation, `judge` that there could have been one.
    """

    def __init__(
        self,
        name: str,
        num_blocks: int,
        num_leased: Callable[[int], int],
        report: Callable[[Invariant, str], None],
        judge: Callable[[Invariant], None],
    ) -> None:
        # Workers of one world differ in that, from one start to the next too: blocks travel between all kinds.
        self.memory = host_memory(_NUMS_PIECES[zlib.crc32(name.encode()) % len(_NUMS_PIECES)], num_blocks, BLOCK_BYTES)
        self.book = BlockPool(num_blocks)
        self._name = name
        self._num_leased = num_leased
        self._report = report
        self._judge = judge
        self._rotten: set[int] = set()  # cached, and changed where they lie: used here unchecked, as the engine does
        self._expected: dict[int, bytes | None] = {}  # None: being filled by whoever took it
        for block_id in range(num_blocks):
            self._abandon(block_id)

    def take(self, num_blocks: int) -> list[int]:
        """Blocks to be filled. Raises `OutOfBlocks`."""
        ids = self.book.allocate(num_blocks)
        for block_id in ids:
            self._judge(Invariant.ONE_OWNER)
            if block_id in self._expected and self._expected[block_id] is None:
                self._report(Invariant.ONE_OWNER, f"{self._name}: block {block_id} is given out, and being filled")
            if self._num_leased(block_id):
                self._report(Invariant.ONE_OWNER, f"{self._name}: block {block_id} is given out, and a lease has it")
            self.check_bytes(block_id)
            self._expected[block_id] = None
            self._rotten.discard(block_id)
        return ids

    def fill(self, block_id: int, name: bytes, subject: Subject) -> Proof:
        """Compute a block."""
        write_block(self.memory, block_id, content_of(name))
        self._expected[block_id] = content_of(name)
        return KEY.prove(self.memory, [block_id], [subject])[0]

    def publish(self, block_id: int, block_hash: BlockHash, parent: BlockHash | None, proof: Proof) -> None:
        """Make a block findable that we filled or fetched."""
        self.use(block_id, block_hash)
        self.book.publish(block_id, block_hash, parent, proof)

    def use(self, block_id: int, name: bytes) -> None:
        """Read a block that holds what this name says."""
        if block_id in self._rotten:
            return
        self._judge(Invariant.RIGHT_BYTES)
        if read_block(self.memory, block_id) != content_of(name):
            self._report(Invariant.RIGHT_BYTES, f"{self._name}: block {block_id} is not {name.hex()}")
        self._expected[block_id] = content_of(name)

    def give_back(self, ids: Sequence[int]) -> None:
        """One reference on each; what is then nobody's is overwritten."""
        for block_id in ids:
            num_left, num_leased = self.book.num_references(block_id) - 1, self._num_leased(block_id)
            if num_leased:
                self._judge(Invariant.SOURCE_HELD)
            if num_left < num_leased:
                self._report(Invariant.SOURCE_HELD, f"{self._name}: block {block_id} is freed, and a lease has it")
        try:
            self.book.release(ids)
        except IntegrityError as error:
            self._report(Invariant.ONE_OWNER, f"{self._name}: {error}")
            return
        for block_id in ids:
            if self.book.num_references(block_id) == 0 and self.book.hash_of(block_id) is None:
                self._abandon(block_id)

    def flip(self, block: Block, offset: int, bit: int) -> None:
        """A bit of a cached block changes where it lies."""
        flip(self.memory, block.slot, offset, bit)
        self._rotten.add(block.slot)
        self._expected[block.slot] = read_block(self.memory, block.slot)

    def check_bytes(self, block_id: int) -> None:
        """Whether a block that nobody fills holds what it should."""
        expected = self._expected[block_id]
        if expected is not None:
            self._judge(Invariant.NO_LATE_BYTE)
        if expected is not None and read_block(self.memory, block_id) != expected:
            self._report(Invariant.NO_LATE_BYTE, f"{self._name}: block {block_id} was written to by somebody else")

    def check_at_rest(self) -> None:
        """Nothing goes on any more: nobody holds anything, and every byte is where it was."""
        for block_id in range(self.memory.num_blocks):
            self.check_bytes(block_id)
            self._judge(Invariant.NO_LEAK)
            if self.book.num_references(block_id):
                text = f"{self._name}: block {block_id} has {self.book.num_references(block_id)} references"
                self._report(Invariant.NO_LEAK, text)
        try:
            self.book.check_integrity()
        except IntegrityError as error:
            self._report(Invariant.ONE_OWNER, f"{self._name}: {error}")

    def _abandon(self, block_id: int) -> None:
        write_block(self.memory, block_id, b"\xdd" * BLOCK_BYTES)
        self._expected[block_id] = b"\xdd" * BLOCK_BYTES
