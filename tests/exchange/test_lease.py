"""The owner's state machine, as transcripts."""

import itertools

import pytest

from kvstore.errors import IllegalTransition, ProtocolViolation
from kvstore.protocol import (
    AbortOrdered,
    AnnouncedBlock,
    BlocksComputed,
    Closed,
    ExchangeTimeouts,
    HangUp,
    LeaseEvent,
    LeaseMachine,
    LeaseOutcome,
    PeerGone,
    Revoke,
    SendEnded,
    StartSend,
)
from kvstore.protocol.lease import TRANSITIONS, LeaseState
from kvstore.protocol.machine import Timer
from kvstore.protocol.messages import (
    Announce,
    Confirm,
    Confirmed,
    Heartbeat,
    Offer,
    ReadGranted,
    ReadRefused,
    ReadRequest,
    Release,
)

TRANSFER = b"transfer-0000001"
TIMEOUTS = ExchangeTimeouts(heartbeat_s=1, lease_ttl_s=10, lease_max_s=25, drain_s=5)
BLOCKS = [AnnouncedBlock(block_id, None, 100 + block_id) for block_id in (4, 5, 9)]


def open_lease(num_blocks: int = 3) -> LeaseMachine:
    lease = LeaseMachine(TRANSFER, num_blocks, TIMEOUTS, now=0.0)
    assert lease.open() == [Offer(TRANSFER, num_blocks)]
    return lease


def complete_lease() -> LeaseMachine:
    lease = open_lease()
    lease.handle(BlocksComputed(0, BLOCKS, last=True), 0.0)
    return lease


def closing_lease() -> LeaseMachine:
    lease = complete_lease()
    lease.handle(ReadRequest(1, TRANSFER, [(0, 2)]), 0.0)
    lease.handle(PeerGone("gone"), 0.0)
    return lease


def closed_lease() -> LeaseMachine:
    lease = complete_lease()
    lease.handle(Confirm(TRANSFER), 0.0)
    return lease


IN_STATE = {
    LeaseState.OPEN: open_lease,
    LeaseState.COMPLETE: complete_lease,
    LeaseState.CLOSING: closing_lease,
    LeaseState.CLOSED: closed_lease,
}
EVENTS: list[LeaseEvent] = [
    BlocksComputed(0, BLOCKS[:1], last=False),
    ReadRequest(7, TRANSFER, [(0, 1)]),
    SendEnded(1),
    Heartbeat([TRANSFER]),
    Confirm(TRANSFER),
    Release(TRANSFER, "enough"),
    AbortOrdered("aborted"),
    PeerGone("gone"),
    Timer(),
]


def test_a_transfer_in_two_chunks_from_offer_to_confirmation():
    lease = open_lease()
    assert lease.handle(BlocksComputed(0, BLOCKS[:2], last=False), 1.0) == [Announce(TRANSFER, 0, BLOCKS[:2], False)]
    assert lease.handle(BlocksComputed(2, BLOCKS[2:], last=True), 2.0) == [Announce(TRANSFER, 2, BLOCKS[2:], True)]
    assert lease.handle(Confirm(TRANSFER), 3.0) == [
        Confirmed(TRANSFER, True),
        Closed(LeaseOutcome.CONFIRMED),
    ]
    assert lease.next_deadline is None


def test_blocks_stay_pinned_until_a_send_of_them_has_ended_even_after_the_confirmation():
    lease = complete_lease()
    assert lease.handle(ReadRequest(1, TRANSFER, [(0, 2), (2, 1)]), 0.0) == [
        ReadGranted(1),
        StartSend(1, ((4, 2), (9, 1))),
    ]
    assert lease.handle(Confirm(TRANSFER), 1.0) == [Confirmed(TRANSFER, True)]
    assert lease.state is LeaseState.CLOSING
    assert lease.handle(SendEnded(1), 2.0) == [Closed(LeaseOutcome.CONFIRMED)]


def test_an_expired_lease_is_revoked():
    lease = complete_lease()
    assert lease.next_deadline == 10.0
    assert lease.handle(Timer(), 9.9) == []
    assert lease.handle(Timer(), 10.0) == [
        Revoke(TRANSFER, "lease expired"),
        Closed(LeaseOutcome.EXPIRED),
    ]


def test_a_confirmation_after_the_end_is_refused():
    assert closing_lease().handle(Confirm(TRANSFER), 10.1) == [Confirmed(TRANSFER, False)]


def test_a_confirmation_is_granted_for_as_long_as_the_blocks_are_held_however_late_our_own_timer_is():
    lease = complete_lease()
    assert lease.handle(Confirm(TRANSFER), 30.0) == [
        Confirmed(TRANSFER, True),
        Closed(LeaseOutcome.CONFIRMED),
    ]


def test_heartbeats_renew_a_lease_but_not_for_ever():
    lease = complete_lease()
    for now in (5.0, 12.0, 20.0):
        lease.handle(Heartbeat([TRANSFER]), now)
    assert lease.next_deadline == 25.0
    assert lease.handle(Timer(), 25.0)[-1] == Closed(LeaseOutcome.EXPIRED)


def test_sends_that_outlive_their_lease_get_their_link_aborted_once():
    lease = closing_lease()
    assert lease.next_deadline == 5.0
    assert [type(action) for action in lease.handle(Timer(), 5.0)] == [HangUp]
    assert lease.next_deadline is None
    assert lease.handle(Timer(), 6.0) == []
    assert lease.handle(SendEnded(1), 7.0) == [Closed(LeaseOutcome.PEER_LOST)]


def test_a_read_after_the_end_is_refused():
    lease = closing_lease()
    assert lease.handle(ReadRequest(2, TRANSFER, [(0, 1)]), 1.0) == [ReadRefused(2, "the lease is over: peer_lost")]


@pytest.mark.parametrize("runs", [[(0, 4)], [(3, 1)], [(0, 3)], [(0, 0)]])
def test_a_reader_that_asks_for_blocks_not_announced_or_no_neighbours_violates_the_protocol(runs):
    with pytest.raises(ProtocolViolation, match=TRANSFER.hex()):
        complete_lease().handle(ReadRequest(1, TRANSFER, runs), 0.0)


def test_a_confirmation_before_the_last_announcement_violates_the_protocol():
    with pytest.raises(ProtocolViolation, match="0 of 3 announced"):
        open_lease().handle(Confirm(TRANSFER), 0.0)


@pytest.mark.parametrize(
    ("first_index", "blocks", "last"),
    [(1, BLOCKS[:1], False), (0, BLOCKS * 2, True), (0, BLOCKS, False), (0, [], True)],
)
def test_announcing_out_of_order_or_too_much_is_the_callers_error(first_index, blocks, last):
    with pytest.raises(ValueError, match="announced"):
        open_lease().handle(BlocksComputed(first_index, blocks, last), 0.0)


def test_every_state_but_the_last_has_a_row_for_every_event_but_blocks_after_the_last_ones():
    every = {type(event) for event in EVENTS}
    assert {state: set(row) for state, row in TRANSITIONS.items()} == {
        LeaseState.OPEN: every,
        LeaseState.COMPLETE: every - {BlocksComputed},
        LeaseState.CLOSING: every,
        LeaseState.CLOSED: set(),
    }


@pytest.mark.parametrize(("state", "event"), list(itertools.product(LeaseState, EVENTS)), ids=repr)
def test_every_event_in_every_state_is_handled_ignored_or_refused_with_the_history(state, event):
    lease = IN_STATE[state]()
    if type(event) not in TRANSITIONS[state]:
        with pytest.raises(IllegalTransition, match=r"illegal in .*History: 0\.0000 OPEN"):
            lease.handle(event, 1.0)
        return
    if isinstance(event, SendEnded) and state is not LeaseState.CLOSING:
        lease.handle(ReadRequest(1, TRANSFER, []), 0.5)
    if isinstance(event, ReadRequest) and state is LeaseState.OPEN:
        lease.handle(BlocksComputed(0, BLOCKS[:1], last=False), 0.5)
    if isinstance(event, Confirm) and state is LeaseState.OPEN:
        return  # a violation, tested above
    closed = [action for action in lease.handle(event, 1.0) if isinstance(action, Closed)]
    assert len(closed) <= 1
    assert bool(closed) == (lease.state is LeaseState.CLOSED and state is not LeaseState.CLOSED)


@pytest.mark.parametrize("event", [Release(TRANSFER, "x"), AbortOrdered("x"), PeerGone("x")], ids=repr)
@pytest.mark.parametrize("state", [LeaseState.OPEN, LeaseState.COMPLETE])
def test_abort_and_lost_peer_end_a_lease_in_every_state(state, event):
    lease = IN_STATE[state]()
    outcome = {
        Release: LeaseOutcome.RELEASED,
        AbortOrdered: LeaseOutcome.REVOKED,
        PeerGone: LeaseOutcome.PEER_LOST,
    }[type(event)]
    assert lease.handle(event, 1.0)[-1] == Closed(outcome)
