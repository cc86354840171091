"""Decides one connection without I/O: what to say, what was heard, and when to give up the peer.

Sans-I/O: every method takes the clock's reading and returns what the shell (`connection.py`) is to do, in order, each
action with the transfer that it belongs to. Messages among the actions are to be sent. The peer that dialled is the
*reader* (`ReaderSession` is our end of it), the one that accepted is the *owner* of blocks.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

from kvstore.block import BlockHash, Run, coalesce
from kvstore.errors import ProtocolViolation
from kvstore.protocol.fetch import FetchMachine
from kvstore.protocol.fetch_events import (
    FetchAction,
    FetchCause,
    FetchEvent,
    Quiesced,
    ReadEnded,
    Reserve,
    Resolve,
    StartRead,
    Verify,
)
from kvstore.protocol.lease import Closed, LeaseAction, LeaseEvent, LeaseMachine, StartSend
from kvstore.protocol.machine import AbortOrdered, HangUp, PeerGone, Timer
from kvstore.protocol.messages import (
    HEARS_SUSPICIONS,
    LENDS_KEPT,
    MAX_HASHES,
    MAX_REQUEST_ID_CHARS,
    WANTS_NAME_REQUESTS,
    Announce,
    Confirm,
    Confirmed,
    Have,
    Heartbeat,
    Message,
    Offer,
    ReadGranted,
    ReadRefused,
    ReadRequest,
    Release,
    Revoke,
    Suspect,
    Take,
    Want,
)
from kvstore.protocol.timeouts import ExchangeTimeouts

# Neighbouring blocks travel as one message up to this size: enough to hide what one costs, small enough to pipeline.
_MAX_RUN_BYTES: Final = 4 * 1024 * 1024
# Prefixes that one reader may be lent at a time, and suspicions looked into: each has a task, and may pin blocks.
_MAX_OWED: Final = 256
_NO_TRANSFER: Final = b""


@dataclass(frozen=True)
class Read:
    """Action: read these runs over the link. `ReadEnded` must follow, always."""

    read_id: int
    runs: list[Run]


@dataclass(frozen=True)
class Pass:
    """Action: pass a message on to whoever holds the blocks. `OwnerSession.settled` follows a `Want` or `Suspect`."""

    message: Want | Take | Have | Suspect


Action: TypeAlias = Message | Reserve | Read | Verify | Resolve | Quiesced | StartSend | Closed | HangUp | Pass
Actions: TypeAlias = list[tuple[bytes, Action]]

_Machine = TypeVar("_Machine", FetchMachine, LeaseMachine)


class _Session(ABC, Generic[_Machine]):
    """Keeps what both ends share: transfers, and time. Call `tick` every `heartbeat_s`."""

    def __init__(self, timeouts: ExchangeTimeouts, now: float) -> None:
        self.transfers: dict[bytes, _Machine] = {}
        """Those that are not over: blocks may still be written or sent."""
        self._timeouts = timeouts
        self._heard_at = now
        self._tick_due = now

    def tick(self, now: float) -> Actions:
        """Beat, and give up what is overdue: as of when the tick was due.

        Where our own loop stood still since, what came meanwhile waits unread; nobody is blamed for that time.
        """
        judged_at = min(now, self._tick_due)
        self._tick_due = now + self._timeouts.heartbeat_s
        silent_s, allowed_s = judged_at - self._heard_at, self._timeouts.peer_timeout_s
        if silent_s > allowed_s:
            return [(_NO_TRANSFER, HangUp(f"silent for {silent_s:.1f} s, {allowed_s} s are allowed"))]
        actions: Actions = [(_NO_TRANSFER, Heartbeat(self._renewed()))]
        for transfer_id, machine in list(self.transfers.items()):
            if machine.next_deadline is not None and machine.next_deadline <= judged_at:
                actions += self._handle(transfer_id, Timer(), now)
        return actions

    def receive(self, message: Message, now: float) -> Actions:
        """Take in what the peer says. Raises `ProtocolViolation`."""
        self._heard_at = now
        return self._receive(message, now)

    @abstractmethod
    def lose(self, detail: str, now: float) -> Actions:
        """End all transfers: the connection is gone. What has been started still ends, with the link."""

    def _renewed(self) -> list[bytes]:
        """Return the transfers that our heartbeats name."""
        return []  # only readers renew leases

    @abstractmethod
    def _receive(self, message: Message, now: float) -> Actions: ...

    @abstractmethod
    def _handle(self, transfer_id: bytes, event: Timer, now: float) -> Actions: ...


class ReaderSession(_Session[FetchMachine]):
    """Our connection to an owner: the fetches on it, until they are quiesced."""

    def __init__(
        self,
        incarnation: str,
        features: frozenset[str],
        two_sided: bool,
        block_bytes: int,
        timeouts: ExchangeTimeouts,
        now: float,
    ) -> None:
        """`incarnation` and `features` (of `messages.FEATURES`) are the owner's; a `two_sided` link needs its grant for
        every read.
        """
        super().__init__(timeouts, now)
        self._incarnation = incarnation
        self._features = features
        self._two_sided = two_sided
        self._block_bytes = block_bytes
        self._max_run_blocks = max(1, _MAX_RUN_BYTES // block_bytes)
        self._next_read_id = itertools.count(1).__next__
        self._ungranted: dict[int, tuple[bytes, list[Run]]] = {}  # asked for, and not granted yet

    def order(
        self,
        transfer_id: bytes,
        expected_hashes: Sequence[BlockHash | None],
        may_be_fewer: bool,
        stage_s: float | None,
        now: float,
    ) -> FetchMachine:
        """Wait for the offer of a transfer from now on. Raises ValueError where it is being fetched already."""
        if transfer_id in self.transfers:
            raise ValueError(f"transfer {transfer_id.hex()} is being fetched already")
        timeouts = self._timeouts if stage_s is None else self._timeouts.with_stages_of(stage_s)
        machine = self.transfers[transfer_id] = FetchMachine(
            transfer_id,
            expected_hashes,
            self._block_bytes,
            timeouts,
            self._next_read_id,
            now,
            may_be_fewer=may_be_fewer,
        )
        return machine

    def check_start(self, transfer_id: bytes, meant: str, now: float) -> Actions:
        """Fail a transfer that is meant for another start of the owner's process than the one that is connected."""
        if meant == self._incarnation:
            return []
        detail = f"the owner is incarnation {self._incarnation}, not {meant}"
        return self.tell(transfer_id, PeerGone(detail, was_another=True), now)

    def want(self, transfer_id: bytes, hashes: Sequence[BlockHash], request_id: str) -> Actions:
        """Ask for the longest prefix of these blocks, in the name of a request if it is one's.

        An owner that does not know that field would take it for a violation; then it is left out.
        """
        known = request_id[:MAX_REQUEST_ID_CHARS] if WANTS_NAME_REQUESTS in self._features else ""
        return [(transfer_id, Want(transfer_id, list(hashes[:MAX_HASHES]), known))]

    def take(self, transfer_id: bytes, now: float) -> Actions:
        """Ask for the blocks that the owner keeps under this id; an owner that keeps none is not asked."""
        if LENDS_KEPT not in self._features:
            return self.tell(transfer_id, AbortOrdered("the owner keeps no blocks of moved requests"), now)
        return [(transfer_id, Take(transfer_id))]

    def tell(self, transfer_id: bytes, event: FetchEvent, now: float) -> Actions:
        """Tell a fetch what has happened; nothing, where it is over."""
        machine = self.transfers.get(transfer_id)
        actions = machine.handle(event, now) if machine is not None else []
        return [each for action in actions for each in self._translate(transfer_id, action)]

    _handle = tell

    def bytes_came(self, now: float) -> None:
        """Note that the link moves: the reads on it share it, so none of them is late."""
        for machine in self.transfers.values():
            machine.bytes_came(now)

    def lose(self, detail: str, now: float) -> Actions:
        actions = [
            each for transfer_id in list(self.transfers) for each in self.tell(transfer_id, PeerGone(detail), now)
        ]
        ungranted, self._ungranted = self._ungranted, {}
        for read_id, (transfer_id, _) in ungranted.items():
            actions += self.tell(transfer_id, ReadEnded(read_id, FetchCause.PEER_LOST, detail), now)
        return actions

    def _renewed(self) -> list[bytes]:
        return [transfer_id for transfer_id, machine in self.transfers.items() if machine.may_succeed]

    def _receive(self, message: Message, now: float) -> Actions:
        match message:
            case Heartbeat():
                return []
            case Offer(transfer_id) if transfer_id not in self.transfers:
                return [(transfer_id, Release(transfer_id, "nobody here waits for this transfer"))]
            case Offer(transfer_id) | Announce(transfer_id) | Confirmed(transfer_id) | Revoke(transfer_id):
                return self.tell(transfer_id, message, now)
            case ReadGranted(read_id):
                transfer_id, runs = self._take_ungranted(read_id)
                return [(transfer_id, Read(read_id, runs))]
            case ReadRefused(read_id, reason):
                transfer_id, _ = self._take_ungranted(read_id)
                return self.tell(transfer_id, ReadEnded(read_id, FetchCause.REFUSED, reason), now)
        raise ProtocolViolation(f"an owner sent {type(message).__name__}")

    def _take_ungranted(self, read_id: int) -> tuple[bytes, list[Run]]:
        if read_id not in self._ungranted:
            raise ProtocolViolation(f"an answer to read {read_id}, which nobody has asked for")
        return self._ungranted.pop(read_id)

    def _translate(self, transfer_id: bytes, action: FetchAction) -> Actions:
        match action:
            case Suspect() if HEARS_SUSPICIONS not in self._features:
                return []
            case StartRead():
                return [(transfer_id, self._start_read(transfer_id, action))]
            case Quiesced():
                del self.transfers[transfer_id]
        return [(transfer_id, action)]

    def _start_read(self, transfer_id: bytes, action: StartRead) -> Read | ReadRequest:
        runs = coalesce(action.remote_ids, action.local_ids, self._max_run_blocks)
        if not self._two_sided:
            return Read(action.read_id, runs)
        # runs count blocks in the owner's pool; the request counts lease indexes, which rise by one along the read
        firsts = itertools.accumulate((run.num_blocks for run in runs), initial=action.indexes[0])
        wanted = [(first, run.num_blocks) for first, run in zip(firsts, runs, strict=False)]
        self._ungranted[action.read_id] = (transfer_id, runs)
        return ReadRequest(action.read_id, transfer_id, wanted)


class OwnerSession(_Session[LeaseMachine]):
    """A reader's connection to us: the leases on it, until they have closed."""

    def __init__(self, transport_name: str, two_sided: bool, timeouts: ExchangeTimeouts, now: float) -> None:
        super().__init__(timeouts, now)
        self._transport_name = transport_name
        self._two_sided = two_sided
        self._num_owed = 0

    def open_lease(self, transfer_id: bytes, num_blocks: int, now: float) -> Actions:
        """Offer the reader `num_blocks` blocks. Raises ValueError where the transfer has a lease already."""
        if transfer_id in self.transfers:
            raise ValueError(f"transfer {transfer_id.hex()} has a lease already")
        machine = self.transfers[transfer_id] = LeaseMachine(transfer_id, num_blocks, self._timeouts, now)
        return [(transfer_id, action) for action in machine.open()]

    def tell(self, transfer_id: bytes, event: LeaseEvent, now: float) -> Actions:
        """Tell a lease what has happened; nothing, where it is over. Raises what `LeaseMachine.handle` raises."""
        machine = self.transfers.get(transfer_id)
        actions: list[LeaseAction] = machine.handle(event, now) if machine is not None else []
        if any(isinstance(action, Closed) for action in actions):
            del self.transfers[transfer_id]
        return [(transfer_id, action) for action in actions]

    _handle = tell

    def settled(self) -> None:
        """Note that what was passed on has been dealt with."""
        self._num_owed -= 1

    def lose(self, detail: str, now: float) -> Actions:
        return [each for transfer_id in list(self.transfers) for each in self.tell(transfer_id, PeerGone(detail), now)]

    def _receive(self, message: Message, now: float) -> Actions:
        match message:
            case Heartbeat(transfer_ids):
                return [each for transfer_id in transfer_ids for each in self.tell(transfer_id, message, now)]
            case Have() | Take():
                return [(_NO_TRANSFER, Pass(message))]
            case Want(transfer_id) if self._num_owed >= _MAX_OWED:
                return [(transfer_id, Revoke(transfer_id, f"{_MAX_OWED} transfers are being lent to you already"))]
            case Suspect() if self._num_owed >= _MAX_OWED:
                return []
            case Want() | Suspect():
                self._num_owed += 1
                return [(_NO_TRANSFER, Pass(message))]
            case ReadRequest() if not self._two_sided:
                raise ProtocolViolation(f"a read request over {self._transport_name}, which is one-sided")
            case ReadRequest(read_id, transfer_id) if transfer_id not in self.transfers:
                return [(transfer_id, ReadRefused(read_id, "there is no such lease (any more)"))]
            case Confirm(transfer_id) if transfer_id not in self.transfers:
                return [(transfer_id, Confirmed(transfer_id, held=False))]
            case ReadRequest(_, transfer_id) | Confirm(transfer_id) | Release(transfer_id):
                return self.tell(transfer_id, message, now)
        raise ProtocolViolation(f"a reader sent {type(message).__name__}")
