"""Defines the reader machine's words: states and causes, events and actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from kvstore.block import Proof, Subject
from kvstore.protocol.machine import AbortOrdered, HangUp, PeerGone, Timer
from kvstore.protocol.messages import Announce, Confirmed, Offer, ReaderMessage, Revoke


class FetchState(Enum):
    """The states of a fetch. Each before DONE and DRAINING is a stage with a deadline of its own."""

    ORDERED = "offer"  # waits for the owner's Offer
    RESERVING = "reserve"  # waits for room in our own pool
    READING = "read"  # reads and verifies blocks as they are announced
    CONFIRMING = "confirm"  # waits for the owner's word that the lease held
    DONE = "done"
    DRAINING = "draining"  # failed; blocks in quarantine
    FAILED = "failed"


class FetchCause(Enum):
    """The causes of a fetch's failure."""

    ABORTED = "aborted"
    PEER_LOST = "peer_lost"
    UNKNOWN_INCARNATION = "unknown_incarnation"
    TIMEOUT = "timeout"
    REVOKED = "revoked"
    REFUSED = "refused"
    LEASE_LOST = "lease_lost"
    RESERVE_FAILED = "reserve_failed"
    READ_FAILED = "read_failed"
    HASH_MISMATCH = "hash"
    DIGEST_MISMATCH = "digest"
    PROTOCOL = "protocol"


@dataclass(frozen=True)
class Reservation:
    """Room for a transfer: one block id per block, of which the first `num_present` hold their content already."""

    block_ids: list[int]
    num_present: int = 0

    def __post_init__(self) -> None:
        if len(set(self.block_ids)) != len(self.block_ids) or not 0 <= self.num_present <= len(self.block_ids):
            raise ValueError(f"a reservation needs distinct blocks, some of them present: {self}")


@dataclass(frozen=True)
class FetchStamps:
    """The times (clock seconds) at which a fetch reached each point; None: it did not."""

    offered: float | None = None
    reserved: float | None = None
    first_read: float | None = None
    last_read: float | None = None
    verified: float | None = None
    confirmed: float | None = None


@dataclass(frozen=True)
class FetchFailure:
    """The stage (`FetchState.value`) and the cause of a fetch's failure."""

    stage: str
    cause: FetchCause
    detail: str


@dataclass(frozen=True)
class FetchResult:
    """The outcome. Without a failure all blocks of the reservation are verified, confirmed, and the caller's."""

    block_ids: list[int]
    num_blocks: int
    """Blocks read, verified ones only."""
    num_bytes: int
    stamps: FetchStamps
    failure: FetchFailure | None = None
    proofs: Sequence[Proof] = ()
    """Of `block_ids`, as the owner announced them: what these blocks are known by from here on."""

    @property
    def ok(self) -> bool:
        """Whether the blocks may be used."""
        return self.failure is None


@dataclass(frozen=True)
class ReadLimits:
    """The size of reads: at most `max_reads` outstanding, each of at most `max_blocks` blocks."""

    max_reads: int = 4
    max_blocks: int = 32


# ---- events -----------------------------------------------------------------


@dataclass(frozen=True)
class Reserved:
    """Local: the room asked for by `Reserve`."""

    reservation: Reservation


@dataclass(frozen=True)
class ReserveFailed:
    """Local: there is and will be no room; nothing is held."""

    detail: str


@dataclass(frozen=True)
class ReadEnded:
    """Transport: a read has really ended. `cause` None: well."""

    read_id: int
    cause: FetchCause | None = None
    detail: str = ""


@dataclass(frozen=True)
class Verified:
    """Local: the positions in a read of blocks that do not fit their proofs; None with a `detail` where it failed."""

    read_id: int
    wrong: Sequence[int] | None
    detail: str = ""


FetchEvent: TypeAlias = (
    Offer
    | Announce
    | Confirmed
    | Revoke
    | Reserved
    | ReserveFailed
    | ReadEnded
    | Verified
    | AbortOrdered
    | PeerGone
    | Timer
)

# ---- actions ----------------------------------------------------------------


@dataclass(frozen=True)
class Reserve:
    """Ask the caller for room. `Reserved` or `ReserveFailed` must follow, always."""

    num_blocks: int


@dataclass(frozen=True)
class StartRead:
    """Read blocks: lease index, the owner's block id and ours, in step. `ReadEnded` must follow, always."""

    read_id: int
    indexes: tuple[int, ...]
    remote_ids: tuple[int, ...]
    local_ids: tuple[int, ...]


@dataclass(frozen=True)
class Verify:
    """Hold our blocks against their proofs, each for its subject. `Verified` must follow, always."""

    read_id: int
    local_ids: tuple[int, ...]
    subjects: tuple[Subject, ...]
    proofs: tuple[Proof, ...]


@dataclass(frozen=True)
class Resolve:
    """The caller's result is known."""

    result: FetchResult


@dataclass(frozen=True)
class Quiesced:
    """No late byte can arrive any more; these reserved blocks are the caller's to free (none after success)."""

    block_ids: list[int]


FetchAction: TypeAlias = ReaderMessage | Reserve | StartRead | Verify | HangUp | Resolve | Quiesced
