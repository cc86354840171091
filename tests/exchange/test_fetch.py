"""The reader's state machine, as transcripts."""

import itertools

import pytest

from kvstore.block import BlockHash, subject_of
from kvstore.errors import IllegalTransition
from kvstore.protocol import (
    AbortOrdered,
    AnnouncedBlock,
    ExchangeTimeouts,
    FetchCause,
    FetchEvent,
    FetchMachine,
    FetchState,
    HangUp,
    PeerGone,
    Quiesced,
    ReadEnded,
    Reservation,
    Reserve,
    Reserved,
    ReserveFailed,
    Resolve,
    Revoke,
    Suspect,
    Verified,
    Verify,
)
from kvstore.protocol.fetch import TRANSITIONS
from kvstore.protocol.fetch_events import ReadLimits, StartRead
from kvstore.protocol.machine import Timer
from kvstore.protocol.messages import (
    Announce,
    Confirm,
    Confirmed,
    Offer,
    Release,
)

TRANSFER = b"transfer-0000001"
TIMEOUTS = ExchangeTimeouts(offer_s=10, reserve_s=20, announce_s=30, read_s=4, confirm_s=5, drain_s=7)
HASHES = [BlockHash(bytes([i]) * 16) for i in range(4)]
EXPECTED = [*HASHES, None]  # four full blocks and a partial one
ANNOUNCED = [AnnouncedBlock(40 + i, hash_, 1000 + i) for i, hash_ in enumerate(EXPECTED)]
ROOM = [7, 8, 9, 3, 1]


class Transcript:
    """Feeds a machine and remembers the clock."""

    def __init__(self, num_present: int = 0, limits: ReadLimits | None = None) -> None:
        self.num_present = num_present
        self.fetch = FetchMachine(
            TRANSFER, EXPECTED, 4096, TIMEOUTS, itertools.count(1).__next__, now=0.0, limits=limits
        )
        self.now = 0.0

    def tell(self, event: FetchEvent, after: float = 0.0) -> list:
        self.now += after
        return self.fetch.handle(event, self.now)

    def to(self, state: FetchState) -> "Transcript":
        """Go the ordinary way to a state (FAILED and DRAINING: by an abort while a read is under way)."""
        path = [FetchState.ORDERED, FetchState.RESERVING, FetchState.READING, FetchState.CONFIRMING, FetchState.DONE]
        steps = [
            [Offer(TRANSFER, 5)],
            [Reserved(Reservation(ROOM, self.num_present))],
            [Announce(TRANSFER, 0, ANNOUNCED, True), ReadEnded(1), Verified(1, [])],
            [Confirmed(TRANSFER, True)],
        ]
        if state in path:
            for events in steps[: path.index(state)]:
                for event in events:
                    self.tell(event)
        else:
            self.to(FetchState.READING)
            self.tell(Announce(TRANSFER, 0, ANNOUNCED, True))
            self.tell(AbortOrdered("enough"))
            if state is FetchState.FAILED:
                self.tell(ReadEnded(1))
        assert self.fetch.state is state
        return self


EVENTS: list[FetchEvent] = [
    Offer(TRANSFER, 5),
    Reserved(Reservation(ROOM)),
    ReserveFailed("full"),
    Announce(TRANSFER, 0, ANNOUNCED[:2], False),
    ReadEnded(1),
    Verified(1, [4]),
    Confirmed(TRANSFER, True),
    Revoke(TRANSFER, "expired"),
    AbortOrdered("enough"),
    PeerGone("gone"),
    Timer(),
]


def only(actions: list, kind: type) -> object:
    found = [action for action in actions if isinstance(action, kind)]
    assert len(found) == 1, actions
    return found[0]


def failure_of(actions: list):
    failure = only(actions, Resolve).result.failure
    assert failure is not None
    return failure.stage, failure.cause


def test_a_transfer_in_two_chunks_from_order_to_confirmation():
    t = Transcript(num_present=1)
    assert t.tell(Offer(TRANSFER, 5), 1.0) == [Reserve(5)]
    assert t.tell(Announce(TRANSFER, 0, ANNOUNCED[:3], False), 1.0) == []  # no room yet: remembered
    assert t.tell(Reserved(Reservation(ROOM, 1)), 1.0) == [StartRead(1, (1, 2), (41, 42), (8, 9))]  # 0 is present
    assert t.tell(Announce(TRANSFER, 3, ANNOUNCED[3:], True), 1.0) == [StartRead(2, (3, 4), (43, 44), (3, 1))]
    subjects = [subject_of(block_hash, TRANSFER, index) for index, block_hash in enumerate(EXPECTED)]
    assert t.tell(ReadEnded(2), 1.0) == [Verify(2, (3, 1), (subjects[3], subjects[4]), (1003, 1004))]
    assert t.tell(ReadEnded(1), 1.0) == [Verify(1, (8, 9), (subjects[1], subjects[2]), (1001, 1002))]
    assert t.tell(Verified(1, []), 1.0) == []
    assert t.tell(Verified(2, []), 1.0) == [Confirm(TRANSFER)]
    resolved, quiesced = t.tell(Confirmed(TRANSFER, True), 1.0)
    result = resolved.result
    assert (result.ok, result.block_ids, result.num_blocks, result.num_bytes) == (True, ROOM, 4, 4 * 4096)
    assert result.proofs == [1000, 1001, 1002, 1003, 1004]
    stamps = result.stamps
    assert (stamps.offered, stamps.reserved, stamps.first_read, stamps.last_read) == (1.0, 3.0, 3.0, 6.0)
    assert (stamps.verified, stamps.confirmed) == (8.0, 9.0)
    assert quiesced == Quiesced([])
    assert t.fetch.next_deadline is None


def test_a_transfer_whose_blocks_are_all_present_reads_nothing_and_still_confirms():
    t = Transcript(num_present=5).to(FetchState.READING)
    assert t.tell(Announce(TRANSFER, 0, ANNOUNCED, True)) == [Confirm(TRANSFER)]


def test_outstanding_reads_are_bounded_in_number_and_size():
    t = Transcript(limits=ReadLimits(max_reads=2, max_blocks=2)).to(FetchState.READING)
    assert t.tell(Announce(TRANSFER, 0, ANNOUNCED, True)) == [
        StartRead(1, (0, 1), (40, 41), (7, 8)),
        StartRead(2, (2, 3), (42, 43), (9, 3)),
    ]
    t.tell(ReadEnded(1))
    assert t.tell(Verified(1, [])) == [StartRead(3, (4,), (44,), (1,))]


def test_a_block_of_another_identity_is_never_read():
    t = Transcript().to(FetchState.READING)
    wrong = [AnnouncedBlock(40, HASHES[1], 1000)]
    actions = t.tell(Announce(TRANSFER, 0, wrong, False))
    assert failure_of(actions) == ("read", FetchCause.HASH_MISMATCH)
    assert not [action for action in actions if isinstance(action, StartRead)]
    assert only(actions, Quiesced) == Quiesced(ROOM)
    only(actions, Release)


def test_the_partial_block_is_checked_for_its_place_whatever_the_owner_calls_it():
    t = Transcript(num_present=4).to(FetchState.READING)
    t.tell(
        Announce(TRANSFER, 0, [*ANNOUNCED[:4], AnnouncedBlock(44, HASHES[2], 1002)], True)
    )  # of which it has a proof
    assert only(t.tell(ReadEnded(1)), Verify).subjects == (subject_of(None, TRANSFER, 4),)


def test_wrong_bytes_fail_the_fetch_are_reported_and_other_reads_keep_the_blocks_in_quarantine():
    t = Transcript(limits=ReadLimits(max_reads=2, max_blocks=3)).to(FetchState.READING)
    t.tell(Announce(TRANSFER, 0, ANNOUNCED, True))
    t.tell(ReadEnded(1))
    actions = t.tell(Verified(1, [1]))
    assert actions[0] == Suspect([HASHES[1]]), "before the lease is given up"
    assert failure_of(actions) == ("read", FetchCause.DIGEST_MISMATCH)
    assert "blocks [1] (the owner's [41])" in only(actions, Resolve).result.failure.detail
    assert t.fetch.quarantined == ROOM
    assert t.tell(ReadEnded(2)) == [Quiesced(ROOM)]
    assert t.fetch.quarantined == []


def test_a_reservation_that_comes_after_the_abort_goes_straight_back():
    t = Transcript().to(FetchState.RESERVING)
    actions = t.tell(AbortOrdered("the client left"))
    assert failure_of(actions) == ("reserve", FetchCause.ABORTED)
    assert not [action for action in actions if isinstance(action, Quiesced)]
    assert t.tell(Reserved(Reservation(ROOM, 2))) == [Quiesced(ROOM)]


def test_a_lease_that_did_not_hold_throughout_voids_verified_blocks():
    t = Transcript().to(FetchState.CONFIRMING)
    actions = t.tell(Confirmed(TRANSFER, False))
    assert failure_of(actions) == ("confirm", FetchCause.LEASE_LOST)
    assert only(actions, Quiesced) == Quiesced(ROOM)


@pytest.mark.parametrize(
    ("state", "deadline_s", "detail"),
    [
        (FetchState.ORDERED, 10, "no offer within 10 s"),
        (FetchState.RESERVING, 20, "no room for 5 blocks within 20 s"),
        (FetchState.READING, 30, "no announcement within 30 s after 0 of 5 blocks"),
        (FetchState.CONFIRMING, 5, "no answer to the confirmation within 5 s"),
    ],
)
def test_each_stage_has_a_deadline_that_names_it(state, deadline_s, detail):
    t = Transcript().to(state)
    assert t.fetch.next_deadline == deadline_s
    assert t.tell(Timer(), deadline_s - 0.1) == []
    actions = t.tell(Timer(), 0.1)
    assert failure_of(actions) == (state.value, FetchCause.TIMEOUT)
    assert only(actions, Resolve).result.failure.detail == detail


def test_a_read_that_does_not_end_times_out_then_has_its_link_aborted_and_only_then_gives_blocks_back():
    t = Transcript().to(FetchState.READING)
    t.tell(Announce(TRANSFER, 0, ANNOUNCED[:2], False), 1.0)
    assert t.fetch.next_deadline == 5.0
    actions = t.tell(Timer(), 4.0)
    assert failure_of(actions) == ("read", FetchCause.TIMEOUT)
    assert only(actions, Resolve).result.failure.detail == "read of 2 blocks from 0 not read within 4 s"
    assert t.fetch.next_deadline == 12.0
    assert [type(action) for action in t.tell(Timer(), 7.0)] == [HangUp]
    assert t.tell(PeerGone("link aborted")) == []
    assert t.tell(ReadEnded(1, FetchCause.READ_FAILED, "aborted"), 1.0) == [Quiesced(ROOM)]


@pytest.mark.parametrize("num_blocks", [0, 4, 6])
def test_an_offer_of_another_size_fails_before_anything_is_reserved(num_blocks):
    actions = Transcript().tell(Offer(TRANSFER, num_blocks))
    assert failure_of(actions) == ("offer", FetchCause.PROTOCOL)
    assert only(actions, Quiesced) == Quiesced([])


@pytest.mark.parametrize(
    ("first_index", "blocks", "last"),
    [(1, ANNOUNCED[1:2], False), (0, ANNOUNCED[:2], True), (0, ANNOUNCED, False), (0, ANNOUNCED * 2, True)],
)
def test_announcements_out_of_order_or_too_many_fail_the_fetch(first_index, blocks, last):
    actions = Transcript().to(FetchState.READING).tell(Announce(TRANSFER, first_index, blocks, last))
    assert failure_of(actions) == ("read", FetchCause.PROTOCOL)


def test_every_state_but_the_last_has_a_row_for_every_event_but_answers_that_nobody_asked_for():
    answers = {Reserved, ReserveFailed, ReadEnded, Verified}
    ended = (FetchState.DONE, FetchState.FAILED)
    assert {state: set(row) - answers for state, row in TRANSITIONS.items()} == {
        state: {type(event) for event in EVENTS} - answers if state not in ended else set() for state in FetchState
    }
    assert {state: set(row) & answers for state, row in TRANSITIONS.items()} == {
        **{state: set() for state in FetchState},
        FetchState.RESERVING: {Reserved, ReserveFailed},
        FetchState.READING: {ReadEnded, Verified},
        FetchState.DRAINING: answers,
    }


@pytest.mark.parametrize(("state", "event"), list(itertools.product(FetchState, EVENTS)), ids=repr)
def test_every_event_in_every_state_is_handled_ignored_or_refused_with_the_history(state, event):
    t = Transcript().to(state)
    if type(event) not in TRANSITIONS[state]:
        with pytest.raises(IllegalTransition, match="History: "):
            t.tell(event)
        return
    if isinstance(event, ReadEnded | Verified) and state is FetchState.READING:
        t.tell(Announce(TRANSFER, 0, ANNOUNCED, True))
    actions = t.tell(event)
    resolved = [action for action in actions if isinstance(action, Resolve)]
    assert len(resolved) == (state is not FetchState.DRAINING and t.fetch.state not in IN_PROGRESS)
    quiesced = [action for action in actions if isinstance(action, Quiesced)]
    assert len(quiesced) == (t.fetch.state in (FetchState.DONE, FetchState.FAILED))


IN_PROGRESS = (FetchState.ORDERED, FetchState.RESERVING, FetchState.READING, FetchState.CONFIRMING)


@pytest.mark.parametrize("event", [AbortOrdered("x"), PeerGone("x"), Revoke(TRANSFER, "x")], ids=repr)
@pytest.mark.parametrize("state", IN_PROGRESS)
def test_abort_lost_peer_and_revocation_end_a_fetch_in_every_stage(state, event):
    t = Transcript().to(state)
    cause = {
        AbortOrdered: FetchCause.ABORTED,
        PeerGone: FetchCause.PEER_LOST,
        Revoke: FetchCause.REVOKED,
    }[type(event)]
    actions = t.tell(event)
    assert failure_of(actions) == (state.value, cause)
    released = [action for action in actions if isinstance(action, Release)]
    assert len(released) == (cause is not FetchCause.PEER_LOST)
