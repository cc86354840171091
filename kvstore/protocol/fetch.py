"""Decides the reader's end of a transfer: order, reserve, read, verify, confirm.

Sans-I/O: `FetchMachine.handle(event, now)` returns what to do; the shell does it. Two promises: `Resolve`
comes out exactly once, and `Quiesced` exactly once after it, when no late byte can arrive. In between a failed fetch is
DRAINING: its blocks stay until every started read has ended, every digest is computed, and the reservation has come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from kvstore.block import BlockHash, Subject, subject_of
from kvstore.protocol.fetch_events import (
    FetchAction,
    FetchCause,
    FetchEvent,
    FetchFailure,
    FetchResult,
    FetchStamps,
    FetchState,
    Quiesced,
    ReadEnded,
    ReadLimits,
    Reservation,
    Reserve,
    Reserved,
    ReserveFailed,
    Resolve,
    StartRead,
    Verified,
    Verify,
)
from kvstore.protocol.machine import AbortOrdered, HangUp, History, PeerGone, Timer
from kvstore.protocol.messages import Announce, AnnouncedBlock, Confirm, Confirmed, Offer, Release, Revoke, Suspect
from kvstore.protocol.timeouts import ExchangeTimeouts


@dataclass
class _Read:
    indexes: tuple[int, ...]
    local_ids: tuple[int, ...]
    deadline: float
    verifying: bool = False


@dataclass
class _Progress:
    """Counts what has been announced, read and verified; all counts and indexes are lease indexes."""

    announced: list[AnnouncedBlock] = field(default_factory=list)
    all_announced: bool = False
    unread: deque[int] = field(default_factory=deque)
    num_verified: int = 0


class FetchMachine:
    """One fetch. Create it, then feed it events; call it with `Timer` at `next_deadline`.

    `expected_hashes`: one per block of the transfer, None where its identity is not known in advance (the partial last
    block). With `may_be_fewer` the owner may offer a prefix of them. `next_read_id` numbers reads uniquely on the
    connection.
    """

    def __init__(
        self,
        transfer_id: bytes,
        expected_hashes: Sequence[BlockHash | None],
        block_bytes: int,
        timeouts: ExchangeTimeouts,
        next_read_id: Callable[[], int],
        now: float,
        limits: ReadLimits | None = None,
        may_be_fewer: bool = False,
    ) -> None:
        self.transfer_id = transfer_id
        self.state = FetchState.ORDERED
        self.reservation: Reservation | None = None
        self.reads: dict[int, _Read] = {}
        self.stamps = FetchStamps()
        self._expected_hashes = list(expected_hashes)
        self._block_bytes = block_bytes
        self._timeouts = timeouts
        self._next_read_id = next_read_id
        self._limits = limits or ReadLimits()
        self._may_be_fewer = may_be_fewer
        self._progress = _Progress()
        self._reserve_pending = False
        self._stage_end: float | None = now + timeouts.offer_s
        self._history = History(f"fetch of transfer {transfer_id.hex()}")

    @property
    def quarantined(self) -> list[int]:
        """The blocks that nobody may use because a read into them may still be going on."""
        if self.state is not FetchState.DRAINING or self.reservation is None:
            return []
        return self.reservation.block_ids

    @property
    def num_announced(self) -> int:
        """How many blocks the owner has said that it has."""
        return len(self._progress.announced)

    @property
    def may_succeed(self) -> bool:
        """Whether there is no result yet."""
        return self.state not in (FetchState.DONE, FetchState.DRAINING, FetchState.FAILED)

    @property
    def next_deadline(self) -> float | None:
        """Return when to call `handle(Timer())`, on the clock of `now`; None: never."""
        ends = [self._stage_end] if self._stage_end is not None else []
        if self.state is FetchState.READING:
            ends += [read.deadline for read in self.reads.values()]
        return min(ends, default=None)

    def bytes_came(self, now: float) -> None:
        """Give the reads that go on their time anew: their link moves, whichever of them it moved. No state changes."""
        for read in self.reads.values():
            if not read.verifying:
                read.deadline = now + self._timeouts.read_s

    def handle(self, event: FetchEvent, now: float) -> list[FetchAction]:
        """Return what `event` makes us do. Raises `IllegalTransition` for a bug of ours; a peer's fails the fetch."""
        self._history.note(now, self.state, event)
        handler = TRANSITIONS[self.state].get(type(event))
        if handler is None:
            raise self._history.illegal(self.state, event)
        return handler(self, event, now)

    # -- ORDERED --

    def _offered(self, event: Offer, now: float) -> list[FetchAction]:
        self.stamps = replace(self.stamps, offered=now)
        if self._may_be_fewer and 0 < event.num_blocks < len(self._expected_hashes):
            del self._expected_hashes[event.num_blocks :]
        if event.num_blocks != len(self._expected_hashes):
            detail = f"{event.num_blocks} blocks offered, {len(self._expected_hashes)} expected"
            return self._fail(FetchCause.PROTOCOL, detail, now)
        self.state = FetchState.RESERVING
        self._stage_end = now + self._timeouts.reserve_s
        self._reserve_pending = True
        return [Reserve(event.num_blocks)]

    # -- RESERVING --

    def _reserved(self, event: Reserved, now: float) -> list[FetchAction]:
        self._reserve_pending = False
        self.reservation = event.reservation
        if len(event.reservation.block_ids) != len(self._expected_hashes):
            detail = f"{len(event.reservation.block_ids)} blocks reserved, {len(self._expected_hashes)} needed"
            return self._fail(FetchCause.RESERVE_FAILED, detail, now)
        self.stamps = replace(self.stamps, reserved=now)
        self.state = FetchState.READING
        self._stage_end = now + self._timeouts.announce_s
        self._progress.unread = deque(i for i in self._progress.unread if i >= event.reservation.num_present)
        return self._go_on(now)

    def _reserve_failed(self, event: ReserveFailed, now: float) -> list[FetchAction]:
        self._reserve_pending = False
        return self._fail(FetchCause.RESERVE_FAILED, event.detail, now)

    # -- RESERVING, READING --

    def _announced(self, event: Announce, now: float) -> list[FetchAction]:
        progress, num_expected = self._progress, len(self._expected_hashes)
        first, end = event.first_index, event.first_index + len(event.blocks)
        if first != len(progress.announced) or end > num_expected or event.last != (end == num_expected):
            detail = (
                f"blocks {first} to {end} announced (last={event.last}), "
                f"{len(progress.announced)} of {num_expected} were so far"
            )
            return self._fail(FetchCause.PROTOCOL, detail, now)
        for index, block in enumerate(event.blocks, first):
            expected = self._expected_hashes[index]
            if expected is not None and block.block_hash != expected:
                got = block.block_hash.hex() if block.block_hash is not None else "a partial block"
                detail = f"block {index}: expected {expected.hex()}, announced {got}"
                return self._fail(FetchCause.HASH_MISMATCH, detail, now)
        progress.announced += event.blocks
        progress.all_announced = event.last
        num_present = self.reservation.num_present if self.reservation is not None else 0
        progress.unread.extend(range(max(first, num_present), end))
        if self.state is FetchState.RESERVING:
            return []
        self._stage_end = now + self._timeouts.announce_s
        return self._go_on(now)

    # -- READING --

    def _read_ended(self, event: ReadEnded, now: float) -> list[FetchAction]:
        read = self.reads[event.read_id]
        if event.cause is not None:
            del self.reads[event.read_id]
            return self._fail(event.cause, f"{_describe(read)}: {event.detail}", now)
        self.stamps = replace(self.stamps, last_read=now)
        read.verifying, read.deadline = True, now + self._timeouts.read_s
        return [self.verification(event.read_id)]

    def verification(self, read_id: int) -> Verify:
        """What is to be verified of a read once it has ended; known from when it starts."""
        read = self.reads[read_id]
        subjects = tuple(self._subject(index) for index in read.indexes)
        proofs = tuple(self._progress.announced[index].proof for index in read.indexes)
        return Verify(read_id, read.local_ids, subjects, proofs)

    def _subject(self, index: int) -> Subject:
        """What we wait for in this place, whatever the owner calls it: else it could give what it has a proof of."""
        return subject_of(self._expected_hashes[index], self.transfer_id, index)

    def _verified(self, event: Verified, now: float) -> list[FetchAction]:
        read = self.reads.pop(event.read_id)
        if event.wrong is None:
            return self._fail(FetchCause.READ_FAILED, f"{_describe(read)}: not verified: {event.detail}", now)
        if event.wrong:
            return self._report_wrong(read, event.wrong, now)
        self._progress.num_verified += len(read.indexes)
        return self._go_on(now)

    def _report_wrong(self, read: _Read, wrong: Sequence[int], now: float) -> list[FetchAction]:
        """Fail, and have the owner look at what it holds: before all else, so that it does not offer it again."""
        indexes = [read.indexes[position] for position in wrong]
        announced = [self._progress.announced[index] for index in indexes]
        detail = f"blocks {indexes} (the owner's {[block.block_id for block in announced]}) do not fit their proofs"
        failing = self._fail(FetchCause.DIGEST_MISMATCH, detail, now)
        hashes = [block.block_hash for block in announced if block.block_hash is not None]
        return [Suspect(hashes), *failing] if hashes else failing

    def _go_on(self, now: float) -> list[FetchAction]:
        """Start what reads we may; when nothing is left to read, confirm."""
        progress, actions = self._progress, list[FetchAction]()
        while progress.unread and len(self.reads) < self._limits.max_reads:
            indexes = tuple(
                progress.unread.popleft() for _ in range(min(self._limits.max_blocks, len(progress.unread)))
            )
            actions.append(self._start_read(indexes, now))
        if progress.all_announced and self._stage_end is not None:
            self._stage_end = None  # from here on the reads' own deadlines hold
        if progress.all_announced and not progress.unread and not self.reads:
            self.stamps = replace(self.stamps, verified=now)
            self.state = FetchState.CONFIRMING
            self._stage_end = now + self._timeouts.confirm_s
            actions.append(Confirm(self.transfer_id))
        return actions

    def _start_read(self, indexes: tuple[int, ...], now: float) -> StartRead:
        assert self.reservation is not None
        if self.stamps.first_read is None:
            self.stamps = replace(self.stamps, first_read=now)
        read_id = self._next_read_id()
        local_ids = tuple(self.reservation.block_ids[i] for i in indexes)
        self.reads[read_id] = _Read(indexes, local_ids, now + self._timeouts.read_s)
        remote_ids = tuple(self._progress.announced[i].block_id for i in indexes)
        return StartRead(read_id, indexes, remote_ids, local_ids)

    # -- CONFIRMING --

    def _confirm_answered(self, event: Confirmed, now: float) -> list[FetchAction]:
        if not event.held:
            return self._fail(FetchCause.LEASE_LOST, "the owner did not hold the lease throughout", now)
        assert self.reservation is not None
        self.stamps = replace(self.stamps, confirmed=now)
        self.state = FetchState.DONE
        self._stage_end = None
        return [Resolve(self._result(self.reservation.block_ids, None)), Quiesced([])]

    # -- failing, from any stage --

    def _unexpected(self, event: FetchEvent, now: float) -> list[FetchAction]:
        return self._fail(
            FetchCause.PROTOCOL, f"the owner sent what belongs to another stage: {type(event).__name__}", now
        )

    def _revoked(self, event: Revoke, now: float) -> list[FetchAction]:
        return self._fail(FetchCause.REVOKED, event.reason, now)

    def _abort(self, event: AbortOrdered, now: float) -> list[FetchAction]:
        return self._fail(FetchCause.ABORTED, event.reason, now)

    def _owner_lost(self, event: PeerGone, now: float) -> list[FetchAction]:
        cause = FetchCause.UNKNOWN_INCARNATION if event.was_another else FetchCause.PEER_LOST
        return self._fail(cause, event.detail, now)

    def _stage_timer(self, event: Timer, now: float) -> list[FetchAction]:
        deadline = self.next_deadline
        if deadline is None or now < deadline:
            return []
        return self._fail(FetchCause.TIMEOUT, self._describe_timeout(now), now)

    def _describe_timeout(self, now: float) -> str:
        progress, num_expected = self._progress, len(self._expected_hashes)
        for read in self.reads.values():
            if self.state is FetchState.READING and now >= read.deadline:
                doing = "verified" if read.verifying else "read"
                return f"{_describe(read)} not {doing} within {self._timeouts.read_s} s"
        match self.state:
            case FetchState.ORDERED:
                return f"no offer within {self._timeouts.offer_s} s"
            case FetchState.RESERVING:
                return f"no room for {num_expected} blocks within {self._timeouts.reserve_s} s"
            case FetchState.READING:
                return (
                    f"no announcement within {self._timeouts.announce_s} s "
                    f"after {len(progress.announced)} of {num_expected} blocks"
                )
            case _:
                return f"no answer to the confirmation within {self._timeouts.confirm_s} s"

    def _fail(self, cause: FetchCause, detail: str, now: float) -> list[FetchAction]:
        failure = FetchFailure(self.state.value, cause, detail)
        actions: list[FetchAction] = [Resolve(self._result([], failure))]
        if cause not in (FetchCause.PEER_LOST, FetchCause.UNKNOWN_INCARNATION):
            actions.append(Release(self.transfer_id, f"{cause.value}: {detail}"[:1024]))
        self.state = FetchState.DRAINING
        self._stage_end = now + self._timeouts.drain_s
        return actions + self._drained()

    def _result(self, block_ids: list[int], failure: FetchFailure | None) -> FetchResult:
        num_blocks = self._progress.num_verified
        proofs = [block.proof for block in self._progress.announced[: len(block_ids)]]
        return FetchResult(block_ids, num_blocks, num_blocks * self._block_bytes, self.stamps, failure, proofs)

    # -- DRAINING --

    def _drain_reservation(self, event: Reserved | ReserveFailed, now: float) -> list[FetchAction]:
        self._reserve_pending = False
        if isinstance(event, Reserved):
            self.reservation = event.reservation
        return self._drained()

    def _drain_read(self, event: ReadEnded | Verified, now: float) -> list[FetchAction]:
        del self.reads[event.read_id]
        return self._drained()

    def _drain_timer(self, event: Timer, now: float) -> list[FetchAction]:
        if self._stage_end is None or now < self._stage_end:
            return []
        self._stage_end = None
        going_on = [read for read in self.reads.values() if not read.verifying]
        if not going_on:
            return []  # a reservation is the caller's to end, a digest ends by itself
        return [HangUp(f"transfer {self.transfer_id.hex()}: {', '.join(map(_describe, going_on))} will not end")]

    def _drained(self) -> list[FetchAction]:
        if self.reads or self._reserve_pending:
            return []
        self.state = FetchState.FAILED
        self._stage_end = None
        return [Quiesced(self.reservation.block_ids if self.reservation is not None else [])]

    def _ignore(self, event: FetchEvent, now: float) -> list[FetchAction]:
        return []


def _describe(read: _Read) -> str:
    return f"read of {len(read.indexes)} blocks from {read.indexes[0]}"


_Handler: TypeAlias = Callable[[FetchMachine, Any, float], list[FetchAction]]
_IGNORE: Final = FetchMachine._ignore  # met on purpose: a race that has been decided already
_UNEXPECTED: Final = FetchMachine._unexpected  # a bug of the peer's: fails the fetch

_GOING_ON: Final[Mapping[type, _Handler]] = {
    Offer: _UNEXPECTED,
    Announce: _UNEXPECTED,
    Confirmed: _UNEXPECTED,
    Revoke: FetchMachine._revoked,
    AbortOrdered: FetchMachine._abort,
    PeerGone: FetchMachine._owner_lost,
    Timer: FetchMachine._stage_timer,
}

# Every state has a row for all that the peer, the caller and the clock may do. What has none is a bug of ours, which
# raises with the history: an answer to what was not asked for, and anything after `Quiesced`, with which a session
# forgets a fetch.
TRANSITIONS: Final[Mapping[FetchState, Mapping[type, _Handler]]] = {
    FetchState.ORDERED: {**_GOING_ON, Offer: FetchMachine._offered},
    FetchState.RESERVING: {
        **_GOING_ON,
        Reserved: FetchMachine._reserved,
        ReserveFailed: FetchMachine._reserve_failed,
        Announce: FetchMachine._announced,
    },
    FetchState.READING: {
        **_GOING_ON,
        Announce: FetchMachine._announced,
        ReadEnded: FetchMachine._read_ended,
        Verified: FetchMachine._verified,
    },
    FetchState.CONFIRMING: {**_GOING_ON, Confirmed: FetchMachine._confirm_answered},
    FetchState.DONE: {},
    FetchState.DRAINING: {
        **dict.fromkeys(_GOING_ON, _IGNORE),
        Reserved: FetchMachine._drain_reservation,
        ReserveFailed: FetchMachine._drain_reservation,
        ReadEnded: FetchMachine._drain_read,
        Verified: FetchMachine._drain_read,
        Timer: FetchMachine._drain_timer,
    },
    FetchState.FAILED: {},
}
