"""The two ends of one connection, the wire and the link between them, as one state that can be copied and compared.

Both sessions are the product's, with their machines. What they order (room, reads, digests, sends) is pending here
until an event ends it. Time is not counted: a deadline may pass at any moment.

    reader: ReaderSession, FetchMachines ── to_owner ─▶ owner: OwnerSession, LeaseMachines
                  ▲      ◀─ to_reader ──                 │
             rooms, verifying, link (reads)            sends, wants
"""

from __future__ import annotations

import hashlib
import marshal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final

from kvstore.block import BlockHash
from kvstore.errors import ProtocolViolation
from kvstore.protocol import (
    FEATURES,
    AbortOrdered,
    Actions,
    AnnouncedBlock,
    BlocksComputed,
    Closed,
    ExchangeTimeouts,
    FetchCause,
    FetchMachine,
    HangUp,
    LeaseMachine,
    LeaseOutcome,
    Message,
    OwnerSession,
    Pass,
    Quiesced,
    Read,
    ReadEnded,
    ReaderSession,
    Reservation,
    Reserve,
    Reserved,
    ReserveFailed,
    Resolve,
    Revoke,
    SendEnded,
    StartSend,
    Suspect,
    Verified,
    Verify,
    Want,
    encode,
)
from kvstore.protocol.fetch_events import ReadLimits
from kvstore.protocol.lease import LeaseState
from kvstore.protocol.machine import Timer
from kvstore.protocol.messages import Announce, Confirm, Confirmed, Heartbeat, Offer, ReadRequest, Release

_IDS_PER_TRANSFER: Final = 100
_TIMEOUTS: Final = ExchangeTimeouts()


class Broken(AssertionError):
    """An invariant does not hold."""


class End(Enum):
    """One side's end of the connection."""

    UP = "up"
    BROKEN = "broken"  # closed, and the session has not been told yet
    LOST = "lost"


@dataclass(frozen=True)
class Transfer:
    """One of the transfers: ordered (its blocks announced one by one, or together), or wanted by hash."""

    number: int
    num_blocks: int
    is_wanted: bool = False

    @property
    def id(self) -> bytes:
        return b"transfer-%d" % self.number

    @property
    def hashes(self) -> list[BlockHash]:
        return [BlockHash(bytes(14) + bytes([self.number, index])) for index in range(self.num_blocks)]

    def blocks(self, first: int, end: int) -> list[AnnouncedBlock]:
        return [
            AnnouncedBlock(10 * self.number + index, block_hash, index)
            for index, block_hash in list(enumerate(self.hashes))[first:end]
        ]


class _Quiet:
    """A history that remembers nothing: it is no part of a state."""

    def note(self, now: float, state: Enum, event: object) -> None: ...

    def illegal(self, state: Enum, event: object) -> Exception:
        return Broken(f"{type(event).__name__} is illegal in {state.name}")


@dataclass
class _ReadIds:
    """Numbers the reads of one transfer: the same whatever the others do."""

    number: int

    def __call__(self) -> int:
        self.number += 1
        return self.number


class Joint:
    """`faults_left`: how many more may happen."""

    def __init__(self, transfers: Sequence[Transfer], two_sided: bool, num_faults: int) -> None:
        self.transfers = {each.id: each for each in transfers}
        self.two_sided = two_sided
        self.faults_left = num_faults
        self.reader = ReaderSession("1", frozenset(FEATURES), two_sided, 1, _TIMEOUTS, 0.0)
        self.owner = OwnerSession("joint", two_sided, _TIMEOUTS, 0.0)
        self.reader_end = self.owner_end = End.UP
        self.to_owner: tuple[Message, ...] = ()
        self.to_reader: tuple[Message, ...] = ()
        self.is_cut = False
        self.rooms: frozenset[bytes] = frozenset()
        self.verifying: frozenset[int] = frozenset()
        self.link: frozenset[int] = frozenset()  # reads that go on
        self.flipped: frozenset[int] = frozenset()
        self.sends: frozenset[int] = frozenset()
        self.ended_reads: frozenset[int] = frozenset()  # whose sends go on
        self.wants: frozenset[bytes] = frozenset()  # that the owner looks for
        self.opened: frozenset[bytes] = frozenset()
        self.results: dict[bytes, bool] = {}
        self.quiesced: frozenset[bytes] = frozenset()
        self.closed: dict[bytes, LeaseOutcome] = {}
        self.stale: frozenset[bytes] = frozenset()  # of which a block was read that was the owner's no more
        self.liar = ""  # the side that has broken the protocol: what it says of itself is worth nothing
        for each in transfers:
            machine = self.reader.order(each.id, each.hashes, each.is_wanted, None, 0.0)
            machine._next_read_id = _ReadIds(_IDS_PER_TRANSFER * each.number)
            machine._history = _Quiet()  # type: ignore[assignment]
            machine._limits = ReadLimits(max_reads=2, max_blocks=1)  # so that blocks wait for their read
            if each.is_wanted:
                self._do_reader(self.reader.want(each.id, each.hashes, ""))

    # ---- copies and keys: of all that a machine has, by name ----

    def copy(self) -> Joint:
        new = object.__new__(Joint)
        new.__dict__.update(self.__dict__)
        new.results, new.closed = dict(self.results), dict(self.closed)
        new.reader, new.owner = _copied(self.reader), _copied(self.owner)
        new.reader.transfers = {each: _copied_fetch(machine) for each, machine in self.reader.transfers.items()}
        new.reader._ungranted = dict(self.reader._ungranted)
        new.owner.transfers = {each: _copied_lease(machine) for each, machine in self.owner.transfers.items()}
        return new

    def key(self) -> bytes:
        """Equal for equal states: a digest over plain values."""
        fetches = tuple((each, _fetch_key(machine)) for each, machine in self.reader.transfers.items())
        leases = tuple(sorted((each, _lease_key(machine)) for each, machine in self.owner.transfers.items()))
        sets = (
            *(self.rooms, self.verifying, self.link, self.flipped, self.sends, self.ended_reads, self.wants),
            *(self.opened, self.results.items(), self.quiesced, self.stale, self.reader._ungranted),
            [(each, outcome.value) for each, outcome in self.closed.items()],
        )
        plain = (
            *(
                self.faults_left,
                self.reader_end.value,
                self.owner_end.value,
                self.is_cut,
                self.owner._num_owed,
                self.liar,
            ),
            *(fetches, leases, tuple(map(encode, self.to_owner)), tuple(map(encode, self.to_reader))),
            tuple(tuple(sorted(each)) for each in sets),
        )
        return hashlib.blake2b(marshal.dumps(plain, 2), digest_size=16).digest()

    # ---- what may happen: the reader's side ----

    def grant_room(self, transfer_id: bytes, num_present: int) -> None:
        self.rooms -= {transfer_id}
        transfer, machine = self.transfers[transfer_id], self.reader.transfers[transfer_id]
        ids = [10 * transfer.number + index for index in range(len(machine._expected_hashes))]
        self._tell_reader(transfer_id, Reserved(Reservation(ids, num_present)))

    def refuse_room(self, transfer_id: bytes) -> None:
        self.rooms -= {transfer_id}
        self._tell_reader(transfer_id, ReserveFailed("no room"))

    def end_read(self, read_id: int) -> None:
        """All bytes have come; where the owner's lease is over, somebody else's."""
        transfer_id = self._leave_link(read_id)
        if transfer_id in self.closed:
            self.stale |= {transfer_id}
        self._tell_reader(transfer_id, ReadEnded(read_id))

    def end_read_flipped(self, read_id: int) -> None:
        self.flipped |= {read_id}
        self.end_read(read_id)

    def fail_read(self, read_id: int) -> None:
        transfer_id = self._leave_link(read_id)
        self._tell_reader(transfer_id, ReadEnded(read_id, FetchCause.READ_FAILED, "failed"))
        self._close_reader()

    def verify(self, read_id: int) -> None:
        self.verifying -= {read_id}
        wrong = [0] if read_id in self.flipped else []
        self._tell_reader(self._transfer_of(read_id), Verified(read_id, wrong))

    def abort(self, transfer_id: bytes) -> None:
        self._tell_reader(transfer_id, AbortOrdered("the client left"))
        if self.reader.transfers.get(transfer_id) is not None and self.reader.transfers[transfer_id].may_succeed:
            raise Broken(f"{transfer_id!r} goes on after its abort")

    def beat(self) -> None:
        self._send_to_owner(Heartbeat(self.reader._renewed()))

    def lose_reader(self) -> None:
        """The shell tells the session that the connection is over, and aborts the link."""
        self.reader_end = End.LOST
        self.to_reader = ()
        self._do_reader(self.reader.lose("lost", 0.0))

    def reader_hears_the_end(self) -> None:
        self._close_reader()

    def time_reader_out(self, transfer_id: bytes) -> None:
        deadline = self.reader.transfers[transfer_id].next_deadline
        assert deadline is not None
        self._do_reader(self.reader.tell(transfer_id, Timer(), deadline))

    def receive_at_reader(self) -> None:
        message, *rest = self.to_reader
        self.to_reader = tuple(rest)
        try:
            self._do_reader(self.reader.receive(message, 0.0))
        except ProtocolViolation:
            if not self.liar:
                raise
            self._close_reader()

    # ---- the owner's side ----

    def open(self, transfer_id: bytes) -> None:
        self.opened |= {transfer_id}
        self._open(transfer_id, self.transfers[transfer_id].num_blocks)

    def lend(self, transfer_id: bytes, num_blocks: int) -> None:
        """What the lender has found of a wanted prefix."""
        self.wants -= {transfer_id}
        if self.owner_end is End.UP and not num_blocks:
            self._send_to_reader(Revoke(transfer_id, "none of these blocks is here"))
        elif self.owner_end is End.UP and transfer_id not in self.owner.transfers:
            self.opened |= {transfer_id}
            self._open(transfer_id, num_blocks)
            blocks = self.transfers[transfer_id].blocks(0, num_blocks)
            self._do_owner(self.owner.tell(transfer_id, BlocksComputed(0, blocks, True), 0.0))
        self.owner.settled()

    def compute(self, transfer_id: bytes, num_blocks: int) -> None:
        transfer, lease = self.transfers[transfer_id], self.owner.transfers[transfer_id]
        first, end = len(lease.blocks), len(lease.blocks) + num_blocks
        event = BlocksComputed(first, transfer.blocks(first, end), end == transfer.num_blocks)
        self._do_owner(self.owner.tell(transfer_id, event, 0.0))

    def revoke(self, transfer_id: bytes) -> None:
        self._do_owner(self.owner.tell(transfer_id, AbortOrdered("thought better of it"), 0.0))

    def end_send(self, read_id: int) -> None:
        self.sends -= {read_id}
        self.ended_reads -= {read_id}
        self._do_owner(self.owner.tell(self._transfer_of(read_id), SendEnded(read_id), 0.0))

    def fail_send(self, read_id: int) -> None:
        self._close_owner()
        self.end_send(read_id)

    def lose_owner(self) -> None:
        self.owner_end = End.LOST
        self.to_owner = ()
        self._do_owner(self.owner.lose("lost", 0.0))

    def owner_hears_the_end(self) -> None:
        self._close_owner()

    def time_owner_out(self, transfer_id: bytes) -> None:
        deadline = self.owner.transfers[transfer_id].next_deadline
        assert deadline is not None
        self._do_owner(self.owner.tell(transfer_id, Timer(), deadline))

    def receive_at_owner(self) -> None:
        message, *rest = self.to_owner
        self.to_owner = tuple(rest)
        try:
            self._do_owner(self.owner.receive(message, 0.0))
        except ProtocolViolation:
            if not self.liar:
                raise
            self._close_owner()

    def cut(self) -> None:
        """The connection is gone, with all that is on its way."""
        self.is_cut = True
        self.to_owner = self.to_reader = ()
        self._close_reader()
        self._close_owner()

    # ---- who lies ----

    def lie_to_reader(self, transfer_id: bytes, lie: str) -> None:
        """The owner says what the protocol does not allow now."""
        self.liar = "owner"
        transfer = self.transfers[transfer_id]
        wrong = AnnouncedBlock(0, bytes(16), 0)
        lies: dict[str, Message] = {
            "offer": Offer(transfer_id, transfer.num_blocks),
            "offer of more": Offer(transfer_id, transfer.num_blocks + 1),
            "announcement": Announce(transfer_id, 0, transfer.blocks(0, 1), transfer.num_blocks == 1),
            "other hash": Announce(transfer_id, 0, [wrong], transfer.num_blocks == 1),
            "confirmation": Confirmed(transfer_id, True),
        }
        self._send_to_reader(lies[lie])

    def lie_to_owner(self, transfer_id: bytes, lie: str) -> None:
        """The reader says what the protocol does not allow now."""
        self.liar = "reader"
        transfer = self.transfers[transfer_id]
        lies: dict[str, Message] = {
            "confirm": Confirm(transfer_id),
            "read": ReadRequest(_IDS_PER_TRANSFER * (transfer.number + 1) - 1, transfer_id, [(0, 1)]),
            "release": Release(transfer_id, "enough"),
        }
        self._send_to_owner(lies[lie])

    # ---- carrying out ----

    def _tell_reader(self, transfer_id: bytes, event: Any) -> None:
        self._do_reader(self.reader.tell(transfer_id, event, 0.0))

    def _do_reader(self, actions: Actions) -> None:
        for transfer_id, action in actions:
            match action:
                case HangUp():
                    self._close_reader()
                case Reserve():
                    self.rooms |= {transfer_id}
                case Read(read_id, _):
                    self.link |= {read_id}
                case Verify(read_id):
                    self.verifying |= {read_id}
                case Resolve(result):
                    self._resolve(transfer_id, result.ok)
                case Quiesced():
                    self._quiesce(transfer_id)
                case _:
                    self._send_to_owner(action)  # type: ignore[arg-type]

    def _resolve(self, transfer_id: bytes, is_ok: bool) -> None:
        if transfer_id in self.results:
            raise Broken(f"{transfer_id!r} has two results")
        self.results[transfer_id] = is_ok
        lease = self.owner.transfers.get(transfer_id)
        outcome = lease.outcome if lease is not None else self.closed.get(transfer_id)
        if self.liar:
            return  # an owner that lies may say yes; its bytes must still fit the proofs, which nobody here computes
        if is_ok and outcome is not LeaseOutcome.CONFIRMED:
            raise Broken(f"{transfer_id!r} may be used, its lease is {outcome}")
        is_flipped = any(self._transfer_of(each) == transfer_id for each in self.flipped)
        if is_ok and (is_flipped or transfer_id in self.stale):
            raise Broken(f"{transfer_id!r} may be used, with wrong bytes")

    def _quiesce(self, transfer_id: bytes) -> None:
        if transfer_id in self.quiesced or transfer_id not in self.results:
            raise Broken(f"{transfer_id!r} is quiesced twice, or before it has a result")
        going_on = [each for each in self.link | self.verifying if self._transfer_of(each) == transfer_id]
        if going_on or transfer_id in self.rooms:
            raise Broken(f"{transfer_id!r} is quiesced while {going_on or 'a reservation'} goes on")
        self.quiesced |= {transfer_id}

    def _do_owner(self, actions: Actions) -> None:
        for transfer_id, action in actions:
            match action:
                case HangUp():
                    self._close_owner()
                case Pass(Want()):
                    self.wants |= {action.message.transfer_id}  # type: ignore[union-attr]
                case Pass(Suspect()):
                    self.owner.settled()
                case StartSend(read_id, _):
                    self.sends |= {read_id}
                case Closed(outcome):
                    self._close_lease(transfer_id, outcome)
                case _:
                    self._send_to_reader(action)  # type: ignore[arg-type]

    def _close_lease(self, transfer_id: bytes, outcome: LeaseOutcome) -> None:
        if transfer_id in self.closed:
            raise Broken(f"the lease of {transfer_id!r} closes twice")
        if any(self._transfer_of(each) == transfer_id for each in self.sends):
            raise Broken(f"the lease of {transfer_id!r} is closed while its blocks are sent")
        self.closed[transfer_id] = outcome

    def _open(self, transfer_id: bytes, num_blocks: int) -> None:
        actions = self.owner.open_lease(transfer_id, num_blocks, 0.0)
        self.owner.transfers[transfer_id]._history = _Quiet()  # type: ignore[assignment]
        self._do_owner(actions)

    def _send_to_owner(self, message: Message) -> None:
        if self.reader_end is End.UP and self.owner_end is not End.LOST and not self.is_cut:
            self.to_owner += (message,)

    def _send_to_reader(self, message: Message) -> None:
        if self.owner_end is End.UP and self.reader_end is not End.LOST and not self.is_cut:
            self.to_reader += (message,)

    def _close_reader(self) -> None:
        if self.reader_end is End.UP:
            self.reader_end = End.BROKEN

    def _close_owner(self) -> None:
        if self.owner_end is End.UP:
            self.owner_end = End.BROKEN

    def _leave_link(self, read_id: int) -> bytes:
        self.link -= {read_id}
        if read_id in self.sends:
            self.ended_reads |= {read_id}
        return self._transfer_of(read_id)

    def _transfer_of(self, read_id: int) -> bytes:
        return b"transfer-%d" % (read_id // _IDS_PER_TRANSFER)

    # ---- rest ----

    def why_not_at_rest(self) -> str:
        """What is held or waited for still; empty where all is over."""
        pending = {
            "rooms": self.rooms,
            "reads": self.link,
            "digests": self.verifying,
            "sends": self.sends,
            "wants": self.wants,
            "fetches": self.reader.transfers.keys() | (self.transfers.keys() - self.quiesced),
            "leases": self.owner.transfers.keys() | (self.opened - self.closed.keys()),
        }
        if self.owner._num_owed:
            return f"{self.owner._num_owed} wants are owed"
        return ", ".join(f"{what}: {sorted(left)}" for what, left in pending.items() if left)


_SESSION_FIELDS: Final = {"transfers", "_timeouts", "_heard_at", "_tick_due"}
FIELDS: Final = {
    FetchMachine: {
        *("transfer_id", "state", "reservation", "reads", "stamps", "_expected_hashes", "_block_bytes", "_timeouts"),
        *("_next_read_id", "_limits", "_may_be_fewer", "_progress", "_reserve_pending", "_stage_end", "_history"),
    },
    LeaseMachine: {
        *("transfer_id", "num_blocks", "state", "outcome", "blocks", "sends", "expires_at", "_hard_end"),
        *("_drain_end", "_timeouts", "_history"),
    },
    ReaderSession: _SESSION_FIELDS
    | {"_incarnation", "_features", "_two_sided", "_block_bytes", "_max_run_blocks", "_next_read_id", "_ungranted"},
    OwnerSession: _SESSION_FIELDS | {"_transport_name", "_two_sided", "_num_owed"},
}
"""What copies and keys know of. A field more would be shared by states that differ in it."""


def check_fields(joint: Joint) -> None:
    """Raise where a machine or a session has other fields than copies and keys know."""
    machines = [*joint.reader.transfers.values(), *joint.owner.transfers.values()]
    for each in (joint.reader, joint.owner, *machines):
        if set(vars(each)) != FIELDS[type(each)]:
            raise Broken(f"{type(each).__name__} has other fields: {set(vars(each)) ^ FIELDS[type(each)]}")


def _copied(item: Any) -> Any:
    new = object.__new__(type(item))
    new.__dict__.update(item.__dict__)
    return new


def _copied_fetch(machine: FetchMachine) -> FetchMachine:
    new, progress = _copied(machine), machine._progress
    new.reads = {read_id: replace(read) for read_id, read in machine.reads.items()}
    new._expected_hashes = list(machine._expected_hashes)
    new._progress = _copied(progress)
    new._progress.announced, new._progress.unread = list(progress.announced), deque(progress.unread)
    new._next_read_id = _copied(machine._next_read_id)
    return new


def _copied_lease(machine: LeaseMachine) -> LeaseMachine:
    new = _copied(machine)
    new.blocks, new.sends = list(machine.blocks), set(machine.sends)
    return new


def _fetch_key(machine: FetchMachine) -> tuple[Any, ...]:
    progress = machine._progress
    return (
        machine.state.value,
        machine.reservation.num_present if machine.reservation is not None else -1,
        tuple((read_id, read.verifying) for read_id, read in machine.reads.items()),
        machine._next_read_id.number,
        len(machine._expected_hashes),
        len(progress.announced),
        progress.all_announced,
        tuple(progress.unread),
        progress.num_verified,
        machine._reserve_pending,
        machine._stage_end is None,
    )


def _lease_key(machine: LeaseMachine) -> tuple[Any, ...]:
    return (
        machine.state.value,
        machine.outcome.value if machine.outcome is not None else "",
        machine.num_blocks,
        len(machine.blocks),
        tuple(sorted(machine.sends)),
        machine._drain_end is None,
    )


def is_computing(lease: LeaseMachine) -> bool:
    """Whether its owner may announce more: until it has heard of the lease's end, it does."""
    return lease.state in (LeaseState.OPEN, LeaseState.CLOSING) and len(lease.blocks) < lease.num_blocks
