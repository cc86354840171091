"""The ends of a connection as transcripts: who is given up, what is renewed, what is answered without a transfer."""

from __future__ import annotations

import pytest

from kvstore.block import BlockHash, Proof, Run
from kvstore.errors import ProtocolViolation
from kvstore.protocol import (
    FEATURES,
    AnnouncedBlock,
    Closed,
    ExchangeTimeouts,
    FetchCause,
    HangUp,
    Have,
    LeaseOutcome,
    OwnerSession,
    Pass,
    PeerGone,
    Quiesced,
    Read,
    ReaderSession,
    Reservation,
    Reserve,
    Reserved,
    Resolve,
    Revoke,
    Suspect,
    Want,
)
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

TIMEOUTS = ExchangeTimeouts(heartbeat_s=1, peer_timeout_s=5, offer_s=3, lease_ttl_s=3)
TRANSFER = b"transfer-0000001"
HASHES = [BlockHash(bytes([i]) * 16) for i in range(3)]
ANNOUNCED = [AnnouncedBlock(40 + i, each, Proof(i)) for i, each in enumerate(HASHES)]


def reader(two_sided: bool = False, features: frozenset[str] = frozenset(FEATURES)) -> ReaderSession:
    return ReaderSession("2", features, two_sided, 4096, TIMEOUTS, 0.0)


def owner(two_sided: bool = True) -> OwnerSession:
    return OwnerSession("ucxx", two_sided, TIMEOUTS, 0.0)


def told(actions: list) -> list:
    return [action for _, action in actions]


def reading(session: ReaderSession) -> list:
    """Bring a transfer to its first read."""
    session.order(TRANSFER, HASHES, False, None, 0.0)
    assert told(session.receive(Offer(TRANSFER, 3), 0.0)) == [Reserve(3)]
    session.tell(TRANSFER, Reserved(Reservation([7, 8, 9])), 0.0)
    return told(session.receive(Announce(TRANSFER, 0, ANNOUNCED, True), 0.0))


def test_a_transfer_that_is_meant_for_another_start_of_the_owner_fails_at_once_and_tells_it_nothing() -> None:
    session = reader()
    machine = session.order(TRANSFER, HASHES, False, None, 0.0)
    assert session.check_start(TRANSFER, "2", 0.0) == []
    resolve, quiesced = told(session.check_start(TRANSFER, "1", 0.0))
    assert resolve.result.failure.cause is FetchCause.UNKNOWN_INCARNATION
    assert (quiesced, machine.may_succeed, session.transfers) == (Quiesced([]), False, {})


def test_a_peer_that_says_nothing_is_given_up_and_one_that_beats_is_not() -> None:
    silent, beating = reader(), reader()
    for second in range(6):
        beating.receive(Heartbeat([]), float(second))
        assert told(beating.tick(float(second))) == [Heartbeat([])]
        assert told(silent.tick(float(second))) == [Heartbeat([])]
    assert told(silent.tick(6.0)) == [HangUp("silent for 6.0 s, 5 s are allowed")]


def test_a_stall_of_our_own_gives_up_neither_the_peer_nor_its_transfers() -> None:
    session = reader()
    session.order(TRANSFER, HASHES, False, None, 0.0)
    session.tick(0.0)
    assert told(session.tick(100.0)) == [Heartbeat([TRANSFER])]  # due at 1.0: what came since is unread
    assert told(session.receive(Offer(TRANSFER, 3), 100.1)) == [Reserve(3)]
    assert told(session.tick(101.0)) == [Heartbeat([TRANSFER])]


def test_a_fetch_that_is_overdue_fails_and_is_renewed_no_more() -> None:
    session = reader()
    session.order(TRANSFER, HASHES, False, None, 0.0)
    for second in range(3):
        assert told(session.tick(float(second))) == [Heartbeat([TRANSFER])]
    beat, resolved, release, quiesced = told(session.tick(3.0))
    assert beat == Heartbeat([TRANSFER])
    assert isinstance(resolved, Resolve)
    assert resolved.result.failure is not None
    assert (resolved.result.failure.cause, type(release), quiesced) == (FetchCause.TIMEOUT, Release, Quiesced([]))
    assert told(session.tick(4.0)) == [Heartbeat([])]
    assert session.transfers == {}


def test_a_lease_is_renewed_by_the_heartbeats_that_name_it() -> None:
    session = owner()
    assert told(session.open_lease(TRANSFER, 3, 0.0)) == [Offer(TRANSFER, 3)]
    session.open_lease(b"forgotten", 3, 0.0)
    with pytest.raises(ValueError, match="has a lease already"):
        session.open_lease(TRANSFER, 3, 0.0)
    session.receive(Heartbeat([TRANSFER, b"unknown"]), 2.0)
    session.tick(2.0)
    expired = [(b"forgotten", Revoke(b"forgotten", "lease expired")), (b"forgotten", Closed(LeaseOutcome.EXPIRED))]
    assert session.tick(3.0) == [(b"", Heartbeat([])), *expired]
    assert list(session.transfers) == [TRANSFER]


def test_a_two_sided_read_waits_for_its_grant_and_a_one_sided_one_does_not() -> None:
    runs = [Run(40, 7, 3)]
    assert reading(reader()) == [Read(1, runs)]
    session = reader(two_sided=True)
    assert reading(session) == [ReadRequest(1, TRANSFER, [(0, 3)])]
    with pytest.raises(ProtocolViolation, match="nobody has asked for"):
        session.receive(ReadGranted(2), 0.0)
    assert told(session.receive(ReadGranted(1), 0.0)) == [Read(1, runs)]


def test_a_read_that_was_never_granted_ends_with_its_connection() -> None:
    session = reader(two_sided=True)
    reading(session)
    kinds = [type(action) for action in told(session.lose("gone", 1.0))]
    assert kinds == [Resolve, Quiesced]
    assert session.transfers == {}
    assert told(session.tell(TRANSFER, PeerGone("again"), 1.0)) == []


def test_a_refused_read_fails_its_fetch() -> None:
    session = reader(two_sided=True)
    reading(session)
    resolved = told(session.receive(ReadRefused(1, "over"), 0.0))[0]
    assert resolved.result.failure.cause is FetchCause.REFUSED


def test_what_belongs_to_no_transfer_is_answered_so_that_nobody_waits() -> None:
    assert told(reader().receive(Offer(TRANSFER, 3), 0.0)) == [Release(TRANSFER, "nobody here waits for this transfer")]
    session = owner()
    assert told(session.receive(Confirm(TRANSFER), 0.0)) == [Confirmed(TRANSFER, False)]
    refused = ReadRefused(4, "there is no such lease (any more)")
    assert told(session.receive(ReadRequest(4, TRANSFER, [(0, 1)]), 0.0)) == [refused]
    for late in (Announce(TRANSFER, 0, [], False), Revoke(TRANSFER, "late"), Confirmed(TRANSFER, True)):
        assert reader().receive(late, 0.0) == []


@pytest.mark.parametrize("session", [reader(), owner()], ids=["reader", "owner"])
def test_what_the_other_side_alone_may_say_is_a_violation(session: ReaderSession | OwnerSession) -> None:
    message = Confirm(TRANSFER) if isinstance(session, ReaderSession) else Offer(TRANSFER, 1)
    with pytest.raises(ProtocolViolation, match="sent"):
        session.receive(message, 0.0)


def test_wants_and_suspicions_are_bounded_and_offers_are_not() -> None:
    session = owner()
    want, suspect, have = Want(TRANSFER, []), Suspect(list(HASHES)), Have("127.0.0.1:1", None, list(HASHES))
    for _ in range(128):
        assert told(session.receive(want, 0.0)) == [Pass(want)]
        assert told(session.receive(suspect, 0.0)) == [Pass(suspect)]
    assert [type(action) for action in told(session.receive(want, 0.0))] == [Revoke]
    assert session.receive(suspect, 0.0) == []
    assert told(session.receive(have, 0.0)) == [Pass(have)]
    session.settled()
    assert told(session.receive(want, 0.0)) == [Pass(want)]


def test_an_owner_hears_only_what_it_knows() -> None:
    known, unknown = reader(), reader(features=frozenset())
    assert told(known.want(TRANSFER, HASHES, "chatcmpl-7")) == [Want(TRANSFER, HASHES, "chatcmpl-7")]
    assert told(unknown.want(TRANSFER, HASHES, "chatcmpl-7")) == [Want(TRANSFER, HASHES)]
