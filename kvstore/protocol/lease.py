"""Decides the owner's end of a transfer: a lease on blocks that a reader may read.

Sans-I/O: `LeaseMachine.handle(event, now)` returns what to do; the shell does it. The blocks stay pinned
until the lease has an outcome *and* no two-sided send of them is in progress; only then does `Closed` come out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, TypeAlias

from kvstore.errors import ProtocolViolation
from kvstore.protocol.machine import AbortOrdered, HangUp, History, PeerGone, Timer
from kvstore.protocol.messages import (
    Announce,
    AnnouncedBlock,
    Confirm,
    Confirmed,
    Heartbeat,
    Offer,
    OwnerMessage,
    ReadGranted,
    ReadRefused,
    ReadRequest,
    Release,
    Revoke,
)
from kvstore.protocol.timeouts import ExchangeTimeouts


class LeaseState(Enum):
    """The states of a lease. OPEN: blocks are still being announced. COMPLETE: all are. CLOSING: over, sends go on."""

    OPEN = "open"
    COMPLETE = "complete"
    CLOSING = "closing"
    CLOSED = "closed"


class LeaseOutcome(Enum):
    """The ways a lease ends."""

    CONFIRMED = "confirmed"
    RELEASED = "released"
    EXPIRED = "expired"
    PEER_LOST = "peer_lost"
    REVOKED = "revoked"


# ---- events -----------------------------------------------------------------


@dataclass(frozen=True)
class BlocksComputed:
    """Local: the next blocks are ready. `first_index` must be the number announced so far."""

    first_index: int
    blocks: Sequence[AnnouncedBlock]
    last: bool


@dataclass(frozen=True)
class SendEnded:
    """Transport: a send has really ended, well or badly."""

    read_id: int


LeaseEvent: TypeAlias = (
    BlocksComputed | SendEnded | AbortOrdered | PeerGone | Timer | Heartbeat | ReadRequest | Confirm | Release
)

# ---- actions ----------------------------------------------------------------


@dataclass(frozen=True)
class StartSend:
    """Send blocks; each run is `(first_block_id, num_blocks)`. `SendEnded` must follow, always."""

    read_id: int
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Closed:
    """The lease is over and nothing of ours touches its blocks any more: the caller frees them."""

    outcome: LeaseOutcome


LeaseAction: TypeAlias = OwnerMessage | StartSend | HangUp | Closed


class LeaseMachine:
    """One lease. Create it, carry out `open()`, then feed it events; call it with `Timer` at `next_deadline`."""

    def __init__(self, transfer_id: bytes, num_blocks: int, timeouts: ExchangeTimeouts, now: float) -> None:
        if num_blocks < 1:
            raise ValueError(f"transfer {transfer_id.hex()}: a lease needs at least one block, not {num_blocks}")
        self.transfer_id = transfer_id
        self.num_blocks = num_blocks
        self.state = LeaseState.OPEN
        self.outcome: LeaseOutcome | None = None
        self.blocks: list[AnnouncedBlock] = []
        self.sends: set[int] = set()
        self.expires_at = now + timeouts.lease_ttl_s
        self._hard_end = now + timeouts.lease_max_s
        self._drain_end: float | None = None
        self._timeouts = timeouts
        self._history = History(f"lease of transfer {transfer_id.hex()}")

    @property
    def next_deadline(self) -> float | None:
        """Return when to call `handle(Timer())`, on the clock of `now`; None: never."""
        if self.state in (LeaseState.OPEN, LeaseState.COMPLETE):
            return self.expires_at
        return self._drain_end if self.state is LeaseState.CLOSING else None

    def open(self) -> list[LeaseAction]:
        """Return the actions that start the lease."""
        return [Offer(self.transfer_id, self.num_blocks)]

    def handle(self, event: LeaseEvent, now: float) -> list[LeaseAction]:
        """Return what `event` makes us do.

        Raises `IllegalTransition` for a bug of ours, `ProtocolViolation` for one of the peer's, and ValueError where
        the caller announces blocks out of order or too many.
        """
        self._history.note(now, self.state, event)
        handler = TRANSITIONS[self.state].get(type(event))
        if handler is None:
            raise self._history.illegal(self.state, event)
        return handler(self, event, now)

    # -- held --

    def _announce(self, event: BlocksComputed, now: float) -> list[LeaseAction]:
        num_announced = len(self.blocks) + len(event.blocks)
        is_last, is_next = num_announced == self.num_blocks, event.first_index == len(self.blocks)
        if not is_next or num_announced > self.num_blocks or event.last != is_last:
            raise ValueError(
                f"transfer {self.transfer_id.hex()}: blocks {event.first_index} to {num_announced} announced "
                f"(last={event.last}), {len(self.blocks)} of {self.num_blocks} were so far"
            )
        self.blocks += event.blocks
        if event.last:
            self.state = LeaseState.COMPLETE
        return [Announce(self.transfer_id, event.first_index, list(event.blocks), event.last)]

    def _grant(self, event: ReadRequest, now: float) -> list[LeaseAction]:
        if event.read_id in self.sends:
            raise ProtocolViolation(f"transfer {self.transfer_id.hex()}: read {event.read_id} requested twice")
        runs = tuple(self._block_run(first_index, num_blocks) for first_index, num_blocks in event.runs)
        self.sends.add(event.read_id)
        return [ReadGranted(event.read_id), StartSend(event.read_id, runs)]

    def _block_run(self, first_index: int, num_blocks: int) -> tuple[int, int]:
        # lease index   first_index .. first_index + num_blocks      must have been announced, and
        # block id      b           .. b + num_blocks                must be neighbours
        end = first_index + num_blocks
        if num_blocks < 1 or end > len(self.blocks):
            raise ProtocolViolation(
                f"transfer {self.transfer_id.hex()}: blocks {first_index} to {end} requested, "
                f"{len(self.blocks)} are announced"
            )
        first_id = self.blocks[first_index].block_id
        if any(self.blocks[first_index + i].block_id != first_id + i for i in range(num_blocks)):
            raise ProtocolViolation(
                f"transfer {self.transfer_id.hex()}: blocks {first_index} to {end} are no run of neighbours"
            )
        return first_id, num_blocks

    def _send_ended(self, event: SendEnded, now: float) -> list[LeaseAction]:
        self.sends.remove(event.read_id)
        return []

    def _renew(self, event: Heartbeat, now: float) -> list[LeaseAction]:
        self.expires_at = min(now + self._timeouts.lease_ttl_s, self._hard_end)
        return []

    def _early_confirm(self, event: Confirm, now: float) -> list[LeaseAction]:
        raise ProtocolViolation(
            f"transfer {self.transfer_id.hex()}: confirmed with {len(self.blocks)} of {self.num_blocks} announced"
        )

    def _confirm(self, event: Confirm, now: float) -> list[LeaseAction]:
        # Even after `expires_at`, where the timer is late: the blocks are held until we end the lease, and not before.
        return [Confirmed(self.transfer_id, True), *self._end(LeaseOutcome.CONFIRMED, now)]

    def _release(self, event: Release, now: float) -> list[LeaseAction]:
        return self._end(LeaseOutcome.RELEASED, now)

    def _revoke(self, event: AbortOrdered, now: float) -> list[LeaseAction]:
        return [Revoke(self.transfer_id, event.reason), *self._end(LeaseOutcome.REVOKED, now)]

    def _reader_lost(self, event: PeerGone, now: float) -> list[LeaseAction]:
        return self._end(LeaseOutcome.PEER_LOST, now)

    def _expire(self, event: Timer, now: float) -> list[LeaseAction]:
        if now < self.expires_at:
            return []
        return [Revoke(self.transfer_id, "lease expired"), *self._end(LeaseOutcome.EXPIRED, now)]

    def _end(self, outcome: LeaseOutcome, now: float) -> list[LeaseAction]:
        self.outcome = outcome
        if self.sends:
            self.state = LeaseState.CLOSING
            self._drain_end = now + self._timeouts.drain_s
            return []
        self.state = LeaseState.CLOSED
        return [Closed(outcome)]

    # -- over --

    def _late_send_ended(self, event: SendEnded, now: float) -> list[LeaseAction]:
        self.sends.remove(event.read_id)
        if self.sends:
            return []
        assert self.outcome is not None
        self.state = LeaseState.CLOSED
        return [Closed(self.outcome)]

    def _refuse_read(self, event: ReadRequest, now: float) -> list[LeaseAction]:
        return [ReadRefused(event.read_id, self._over())]

    def _refuse_confirm(self, event: Confirm, now: float) -> list[LeaseAction]:
        return [Confirmed(self.transfer_id, False)]

    def _abort_sends(self, event: Timer, now: float) -> list[LeaseAction]:
        if self._drain_end is None or now < self._drain_end:
            return []
        self._drain_end = None
        return [
            HangUp(f"{len(self.sends)} sends of transfer {self.transfer_id.hex()} go on, {self._over()}"),
        ]

    def _ignore(self, event: LeaseEvent, now: float) -> list[LeaseAction]:
        return []

    def _over(self) -> str:
        assert self.outcome is not None
        return f"the lease is over: {self.outcome.value}"


_Handler: TypeAlias = Callable[[LeaseMachine, Any, float], list[LeaseAction]]
_IGNORE: Final = LeaseMachine._ignore  # met on purpose: a race that has been decided already

_HELD: Final[Mapping[type, _Handler]] = {
    ReadRequest: LeaseMachine._grant,
    SendEnded: LeaseMachine._send_ended,
    Heartbeat: LeaseMachine._renew,
    Release: LeaseMachine._release,
    AbortOrdered: LeaseMachine._revoke,
    PeerGone: LeaseMachine._reader_lost,
    Timer: LeaseMachine._expire,
}

# `PeerGone` is the lost peer, `Timer` the deadline, `AbortOrdered` and `Release` the two ends' aborts. What has no row
# is a bug of ours, which raises with the history: blocks after the last ones, and anything after `Closed`, with which a
# session forgets a lease.
TRANSITIONS: Final[Mapping[LeaseState, Mapping[type, _Handler]]] = {
    LeaseState.OPEN: {
        **_HELD,
        BlocksComputed: LeaseMachine._announce,
        Confirm: LeaseMachine._early_confirm,
    },
    LeaseState.COMPLETE: {
        **_HELD,
        Confirm: LeaseMachine._confirm,
    },
    LeaseState.CLOSING: {
        **dict.fromkeys(_HELD, _IGNORE),
        BlocksComputed: _IGNORE,
        ReadRequest: LeaseMachine._refuse_read,
        Confirm: LeaseMachine._refuse_confirm,
        SendEnded: LeaseMachine._late_send_ended,
        Timer: LeaseMachine._abort_sends,
    },
    LeaseState.CLOSED: {},
}
