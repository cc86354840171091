"""What the disk tier's operations come to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from kvstore.block import BlockHash, Checksum, Proof


class PutOutcome(Enum):
    """The outcomes of `put`. PAUSED: the disk refused writes a moment ago or just now. BUSY: all slots in use."""

    STORED = "stored"
    PRESENT = "present"
    PAUSED = "paused"
    BUSY = "busy"


class PutResult(NamedTuple):
    """`evicted`: the blocks that lost their place, whatever the outcome."""

    outcome: PutOutcome
    evicted: tuple[BlockHash, ...]


class StoredBlock(NamedTuple):
    """A block that `get` found and verified."""

    parent_hash: BlockHash | None
    proof: Proof
    checksum: Checksum


class GetFailure(Enum):
    """The reasons why `get` filled nothing. CORRUPT: bytes or file are not what was put; the block is dropped."""

    MISSING = "missing"
    CORRUPT = "corrupt"


@dataclass
class DiskStats:
    """Counts since the opening, in blocks."""

    num_stored: int = 0
    num_read: int = 0
    num_evicted: int = 0
    num_corrupt: int = 0
    num_write_errors: int = 0
