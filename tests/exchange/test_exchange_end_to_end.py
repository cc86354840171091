"""The whole block protocol over real TCP connections, with blocks moving through the in-memory transport."""

import asyncio
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from kvstore.block import ProofKey
from kvstore.errors import (
    IncompatiblePeer,
    PeerLost,
    PeerUnreachable,
    TransportError,
)
from kvstore.exchange import BlockExchange
from kvstore.peer_keys import PeerKeys
from kvstore.protocol import ExchangeTimeouts, FetchCause, LeaseOutcome, Reservation
from tests.exchange.exchange_worker import LAYOUT, PATIENT, PEER_KEY, TRANSFER, Worker, room, running, some_hashes
from tests.memory_transport import Faults, MemoryTransport, Switchboard
from tests.proofs import KEY

SOURCE, TARGET = [9, 10, 11, 3, 40, 41, 7, 8, 63, 0], [5, 6, 7, 20, 30, 31, 1, 2, 3, 4]


def make_pair(faults: Faults | None = None, timeouts: ExchangeTimeouts = PATIENT) -> tuple[Worker, Worker]:
    switchboard = Switchboard()
    reader = Worker("decode-0", switchboard, faults=faults, timeouts=timeouts)
    return Worker("prefill-0", switchboard, timeouts=timeouts), reader


def start_transfer(owner: Worker, reader: Worker, reserve=None, transfer_id: bytes = TRANSFER):
    """Order, offer and announce ten blocks in one go."""
    hashes = some_hashes(10)
    fetch = reader.exchange.fetch(transfer_id, "prefill-0", hashes, reserve or room(TARGET))
    lease = owner.exchange.open_lease(transfer_id, "decode-0", 10)
    lease.announce(0, owner.announced(SOURCE, hashes), last=True)
    return fetch, lease


async def test_blocks_announced_in_chunks_arrive_and_the_lease_is_confirmed():
    owner, reader = make_pair(Faults(max_delay_s=0.005))
    hashes = some_hashes(10)
    async with running(owner, reader):
        assert await reader.exchange.connect(owner.exchange.address) == "prefill-0"
        fetch = reader.exchange.fetch(TRANSFER, "prefill-0", hashes, room(TARGET, num_present=1))
        lease = owner.exchange.open_lease(TRANSFER, "decode-0", 10)
        lease.announce(0, owner.announced(SOURCE[:6], hashes[:6]), last=False)
        lease.announce(6, owner.announced(SOURCE[6:], hashes[6:], first=6), last=True)
        result = await fetch.result
        assert result.ok, result.failure
        assert (result.block_ids, result.num_blocks) == (TARGET, 9)
        assert await fetch.quiesced == []
        assert await lease.closed is LeaseOutcome.CONFIRMED
        np.testing.assert_array_equal(reader.memory.array[TARGET[1:]], owner.memory.array[SOURCE[1:]])
        stamps = result.stamps
        assert stamps.offered <= stamps.reserved <= stamps.first_read <= stamps.last_read <= stamps.verified
        assert stamps.verified <= stamps.confirmed
        assert reader.exchange.state()["fetches"] == []
        assert owner.exchange.state()["leases"] == []


async def test_two_workers_may_read_from_each_other_at_once():
    owner, reader = make_pair()
    async with running(owner, reader):
        assert await asyncio.gather(
            reader.exchange.connect(owner.exchange.address), owner.exchange.connect(reader.exchange.address)
        ) == ["prefill-0", "decode-0"]
        there, _ = start_transfer(owner, reader)
        hashes = some_hashes(2)
        back = owner.exchange.fetch(b"back", "decode-0", hashes, room([20, 21]))
        announced = reader.announced([50, 51], hashes, transfer_id=b"back")
        reader.exchange.open_lease(b"back", "prefill-0", 2).announce(0, announced, last=True)
        assert (await there.result).ok
        assert (await back.result).ok
        np.testing.assert_array_equal(owner.memory.array[[20, 21]], reader.memory.array[[50, 51]])


async def test_connecting_again_or_at_the_same_time_uses_the_one_connection():
    owner, reader = make_pair()
    async with running(owner, reader):
        address = owner.exchange.address
        assert await asyncio.gather(*(reader.exchange.connect(address) for _ in range(5))) == ["prefill-0"] * 5
        await reader.exchange.connect(address)
        assert len(owner.exchange.state()["readers"]) == 1
        assert reader.exchange.is_connected("prefill-0")
        assert owner.exchange.is_connected("decode-0")
        assert not owner.exchange.is_connected("decode-1")


async def test_a_flipped_bit_fails_the_fetch_with_cause_digest_and_the_blocks_come_back():
    owner, reader = make_pair(Faults(corrupt=1.0))
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease = start_transfer(owner, reader)
        failure = (await fetch.result).failure
        assert failure is not None
        assert (failure.stage, failure.cause) == ("read", FetchCause.DIGEST_MISMATCH)
        assert sorted(await fetch.quiesced) == sorted(TARGET)
        assert await lease.closed is LeaseOutcome.RELEASED
        assert reader.exchange.is_connected("prefill-0")


@pytest.mark.parametrize("corrupt", [0.0, 1.0])
async def test_what_the_transport_tells_to_have_landed_is_verified_then_and_by_nobody_else(
    corrupt: float, monkeypatch: pytest.MonkeyPatch
):
    owner, reader = make_pair(Faults(tell_every=1, corrupt=corrupt))
    verified: list[int] = []
    find_wrong = ProofKey.find_wrong

    def noted(key, memory, block_ids, *rest):
        verified.extend(block_ids)
        return find_wrong(key, memory, block_ids, *rest)

    monkeypatch.setattr(ProofKey, "find_wrong", noted)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease = start_transfer(owner, reader)
        result = await fetch.result
        assert sorted(verified) == sorted(TARGET)
        if not corrupt:
            assert result.ok
            assert await lease.closed is LeaseOutcome.CONFIRMED
        else:
            assert result.failure is not None
            assert result.failure.cause is FetchCause.DIGEST_MISMATCH
            assert sorted(await fetch.quiesced) == sorted(TARGET)
            assert await lease.closed is LeaseOutcome.RELEASED


async def test_a_check_that_breaks_where_the_bytes_landed_is_made_again_and_ends_the_fetch(
    monkeypatch: pytest.MonkeyPatch,
):
    owner, reader = make_pair(Faults(tell_every=1))

    def broken(*_: object) -> list[int]:
        raise MemoryError("no room for sums")

    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        monkeypatch.setattr(ProofKey, "find_wrong", broken)
        monkeypatch.setattr("kvstore.exchange.reader._MAX_INLINE_BYTES", 0)
        fetch, lease = start_transfer(owner, reader)
        failure = (await fetch.result).failure
        assert failure is not None
        assert failure.cause is FetchCause.READ_FAILED
        assert "no room for sums" in failure.detail
        assert sorted(await fetch.quiesced) == sorted(TARGET)
        assert await lease.closed is LeaseOutcome.RELEASED


@pytest.mark.parametrize("forged", ["of another transfer", "of another place", "another block's"])
async def test_what_was_proven_for_something_else_is_not_taken_in_a_handoff(forged: str):
    owner, reader = make_pair()
    hashes = some_hashes(10)
    honest = owner.announced(SOURCE, hashes)
    announced = list(honest)
    match forged:
        case "of another transfer":  # the partial block, as it was proven before
            announced[9] = owner.announced(SOURCE[9:], [None], first=9, transfer_id=b"an earlier one")[0]
        case "of another place":
            announced[9] = owner.announced(SOURCE[9:], [None], first=8)[0]
        case "another block's":  # good bytes with their good proof, under another name
            announced[3] = msgspec.structs.replace(announced[4], block_hash=hashes[3])
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch = reader.exchange.fetch(TRANSFER, "prefill-0", hashes, room(TARGET))
        owner.exchange.open_lease(TRANSFER, "decode-0", 10).announce(0, announced, last=True)
        failure = (await fetch.result).failure
        assert failure is not None
        assert failure.cause is FetchCause.DIGEST_MISMATCH
        wrong = next(index for index, block in enumerate(honest) if block != announced[index])
        assert f"blocks [{wrong}]" in failure.detail
        assert sorted(await fetch.quiesced) == sorted(TARGET)


async def test_a_hanging_read_times_out_is_ended_with_its_link_and_the_next_connection_works():
    owner, reader = make_pair(Faults(stall=1.0), replace(PATIENT, read_s=1.0))
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease = start_transfer(owner, reader)
        failure = (await fetch.result).failure
        assert failure is not None
        assert (failure.stage, failure.cause) == ("read", FetchCause.TIMEOUT)
        assert fetch.machine.quarantined == TARGET
        assert [entry["quarantined_blocks"] for entry in reader.exchange.state()["fetches"]] == [TARGET]
        assert await fetch.quiesced == TARGET
        assert await lease.closed is LeaseOutcome.RELEASED
        reader.transport.faults = Faults()
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease = start_transfer(owner, reader)
        assert (await fetch.result).ok
        assert await lease.closed is LeaseOutcome.CONFIRMED


async def test_a_failed_read_ends_its_connection_and_the_other_fetches_on_it_fail_as_peer_lost():
    owner, reader = make_pair(Faults(fail=1.0))
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        waiting = reader.exchange.fetch(b"waiting", "prefill-0", some_hashes(1), room([40]))
        fetch, lease = start_transfer(owner, reader)
        causes = [(await each.result).failure.cause for each in (fetch, waiting)]
        assert causes == [FetchCause.READ_FAILED, FetchCause.PEER_LOST]
        assert await fetch.quiesced == TARGET
        assert await lease.closed in (LeaseOutcome.RELEASED, LeaseOutcome.PEER_LOST)


async def test_an_owner_that_goes_away_fails_fetches_at_once_and_a_reader_that_goes_away_ends_leases():
    owner, reader = make_pair(Faults(stall=1.0))
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease = start_transfer(owner, reader)
        await owner.exchange.close()
        assert await lease.closed is LeaseOutcome.PEER_LOST
        assert (await fetch.result).failure.cause is FetchCause.PEER_LOST
        assert await fetch.quiesced in ([], TARGET)  # the loss may come before the reservation
        assert not reader.exchange.is_connected("prefill-0")
        with pytest.raises(PeerLost, match="prefill-0"):
            reader.exchange.fetch(b"next", "prefill-0", [None], room([1]))
        with pytest.raises(PeerUnreachable):
            await reader.exchange.connect(owner.exchange.address)


async def test_an_abort_while_reserving_waits_for_the_reservation_and_gives_it_back():
    owner, reader = make_pair()
    asked = asyncio.Event()
    granted: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()

    async def reserve(num_blocks: int) -> Reservation:
        asked.set()
        return await granted

    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease = start_transfer(owner, reader, reserve)
        await asked.wait()
        fetch.abort("the client left")
        assert (await fetch.result).failure.cause is FetchCause.ABORTED
        assert await lease.closed is LeaseOutcome.RELEASED
        assert not fetch.quiesced.done()
        granted.set_result(Reservation(TARGET))
        assert await fetch.quiesced == TARGET


async def test_a_reservation_that_fails_fails_the_fetch():
    owner, reader = make_pair()

    async def reserve(num_blocks: int) -> Reservation:
        raise ValueError("no such request")

    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease = start_transfer(owner, reader, reserve)
        failure = (await fetch.result).failure
        assert (failure.cause, failure.detail) == (FetchCause.RESERVE_FAILED, "ValueError('no such request')")
        assert await fetch.quiesced == []
        assert await lease.closed is LeaseOutcome.RELEASED


async def test_revoking_a_lease_fails_the_fetch_with_the_reason():
    owner, reader = make_pair()
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch = reader.exchange.fetch(TRANSFER, "prefill-0", some_hashes(10), room(TARGET))
        lease = owner.exchange.open_lease(TRANSFER, "decode-0", 10)
        lease.revoke("the prompt was aborted")
        assert await lease.closed is LeaseOutcome.REVOKED
        lease.announce(0, owner.announced(SOURCE, some_hashes(10)), last=True)  # a step that was under way: ignored
        failure = (await fetch.result).failure
        assert (failure.cause, failure.detail) == (FetchCause.REVOKED, "the prompt was aborted")


async def test_an_offer_for_an_unknown_transfer_is_released():
    owner, reader = make_pair()
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        assert await owner.exchange.open_lease(TRANSFER, "decode-0", 1).closed is LeaseOutcome.RELEASED
        with pytest.raises(PeerLost, match="decode-1"):
            owner.exchange.open_lease(TRANSFER, "decode-1", 1)


async def test_a_fetch_from_another_incarnation_than_the_ordered_one_fails_at_once():
    owner, reader = make_pair()
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch = reader.exchange.fetch(TRANSFER, "prefill-0", [None], room([1]), owner_incarnation="prefill-0-2")
        failure = (await fetch.result).failure
        assert failure.cause is FetchCause.UNKNOWN_INCARNATION
        assert failure.detail == "the owner is incarnation prefill-0-1, not prefill-0-2"
        assert await fetch.quiesced == []


async def test_cancelling_who_waits_for_a_result_leaves_the_fetch_alone():
    owner, reader = make_pair()
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch = reader.exchange.fetch(TRANSFER, "prefill-0", some_hashes(10), room(TARGET))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(fetch.result, 0.01)
        lease = owner.exchange.open_lease(TRANSFER, "decode-0", 10)
        lease.announce(0, owner.announced(SOURCE, some_hashes(10)), last=True)
        assert (await fetch.result).ok


async def test_another_layout_is_refused_on_both_sides_naming_both_values(caplog: pytest.LogCaptureFixture):
    switchboard = Switchboard()
    other = replace(LAYOUT, dtype="bfloat16", block_size=16)
    owner, reader = Worker("prefill-0", switchboard), Worker("decode-0", switchboard, layout=other)
    async with running(owner, reader):
        with pytest.raises(IncompatiblePeer) as refused:
            await reader.exchange.connect(owner.exchange.address)
        assert "dtype: ours bfloat16, theirs float32" in str(refused.value)
        assert "block_size: ours 16, theirs 8" in str(refused.value)
        await reader.exchange.close()
        await owner.exchange.close()
    messages = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert any("ours bfloat16, theirs float32" in message for message in messages)
    assert any("ours float32, theirs bfloat16" in message for message in messages)


class BrokenTransport(MemoryTransport):
    """Installed, and no good on this host."""

    name = "broken"

    async def start(self) -> None:
        raise TransportError("broken: no device")


async def test_a_transport_that_cannot_start_is_left_out_unless_it_is_the_only_one():
    owner, reader = make_pair()
    broken = BrokenTransport(owner.memory, Switchboard())
    identity = owner.exchange.identity
    keys = PeerKeys((PEER_KEY,))
    fallback = BlockExchange(identity, owner.memory, [broken, owner.transport], PATIENT, proof_key=KEY, keys=keys)
    async with running(reader):
        await fallback.start("127.0.0.1", 0)
        await reader.exchange.connect(fallback.address)
        assert [peer["transport"] for peer in reader.exchange.state()["owners"]] == ["memory"]
        await fallback.close()
    with pytest.raises(TransportError, match="no device"):
        await BlockExchange(identity, owner.memory, [broken], PATIENT, proof_key=KEY).start("127.0.0.1", 0)


async def test_two_workers_of_one_name_are_refused():
    switchboard = Switchboard()
    one, two = Worker("prefill-0", switchboard), Worker("prefill-0", switchboard)
    async with running(one, two):
        with pytest.raises(IncompatiblePeer, match="two workers are called prefill-0"):
            await two.exchange.connect(one.exchange.address)


async def test_closing_ends_everything_even_a_reservation_that_never_comes():
    owner, reader = make_pair()

    asked = asyncio.Event()

    async def reserve(num_blocks: int) -> Reservation:
        asked.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease = start_transfer(owner, reader, reserve)
        await asked.wait()
        await reader.exchange.close()
        assert (await fetch.result).failure.cause is FetchCause.PEER_LOST
        assert await fetch.quiesced == []
        assert await lease.closed is LeaseOutcome.PEER_LOST
        await reader.exchange.close()
        await owner.exchange.close()
    assert len(asyncio.all_tasks()) == 1
