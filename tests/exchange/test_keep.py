"""Kept blocks: a lease for whoever names an id, once; and every way in which nobody does."""

import numpy as np
import pytest

from kvstore.exchange.keep import Keep
from kvstore.protocol import FetchCause, FetchState, LeaseOutcome
from tests.exchange.exchange_worker import PATIENT, TRANSFER, Worker, room, running, some_hashes
from tests.memory_transport import Faults, Switchboard
from tests.waiting import until

HASHES = some_hashes(4)
NEVER_S = 3600.0


def make_pair(faults: Faults | None = None, lease_ttl_s: float = NEVER_S) -> tuple[Worker, Worker]:
    switchboard = Switchboard()
    timeouts = {**vars(PATIENT), "lease_ttl_s": lease_ttl_s}
    owner = Worker("decode-0", switchboard, timeouts=type(PATIENT)(**timeouts))
    return owner, Worker("decode-1", switchboard, faults=faults)


def keep(owner: Worker) -> Keep:
    return owner.exchange.keep(TRANSFER, owner.announced([20, 21, 22, 23], HASHES))


def take(reader: Worker, block_ids: list[int]):
    return reader.exchange.fetch_kept(TRANSFER, "decode-0", HASHES, room(block_ids), "decode-0-1")


async def test_kept_blocks_are_read_once_the_partial_one_included() -> None:
    owner, reader = make_pair()
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        kept = keep(owner)
        assert owner.exchange.state()["num_kept"] == 1
        result = await take(reader, [1, 2, 3, 4]).result
        assert result.ok, result.failure
        np.testing.assert_array_equal(reader.memory.array[1:5], owner.memory.array[20:24])
        assert await kept.closed is LeaseOutcome.CONFIRMED
        again = take(reader, [5, 6, 7, 8])
        assert (await again.result).failure.cause is FetchCause.REVOKED
        assert await again.quiesced == []
        assert owner.exchange.state()["num_kept"] == 0


async def test_what_nobody_asks_for_in_time_is_given_back() -> None:
    owner, reader = make_pair(lease_ttl_s=0.1)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        assert await keep(owner).closed is LeaseOutcome.EXPIRED
        assert (await take(reader, [1, 2, 3, 4]).result).failure.cause is FetchCause.REVOKED


async def test_what_nobody_has_asked_for_at_the_owners_end_is_given_back() -> None:
    owner, _ = make_pair()
    async with running(owner):
        kept = keep(owner)
    assert await kept.closed is LeaseOutcome.REVOKED


@pytest.mark.parametrize("who", ["reader", "owner"])
async def test_blocks_come_back_where_either_end_goes_in_the_midst_of_reading(who: str) -> None:
    owner, reader = make_pair(Faults(stall=1.0))
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        kept = keep(owner)
        fetch = take(reader, [1, 2, 3, 4])
        await until(lambda: fetch.machine.state is FetchState.READING)
        await (reader if who == "reader" else owner).exchange.close()
        assert await kept.closed is LeaseOutcome.PEER_LOST
        assert (await fetch.result).failure is not None
        assert await fetch.quiesced == [1, 2, 3, 4]


async def test_an_aborted_reader_frees_the_owners_blocks() -> None:
    owner, reader = make_pair(Faults(stall=1.0))
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        kept = keep(owner)
        fetch = take(reader, [1, 2, 3, 4])
        await until(lambda: fetch.machine.state is FetchState.READING)
        fetch.abort("its client has gone")
        assert await kept.closed is LeaseOutcome.RELEASED


async def test_a_reader_that_has_a_lease_under_this_id_gets_no_other_and_the_blocks_come_back() -> None:
    owner, reader = make_pair()
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        lease = owner.exchange.open_lease(TRANSFER, "decode-1", 4)
        kept = keep(owner)
        fetch = take(reader, [1, 2, 3, 4])
        assert await kept.closed is LeaseOutcome.REVOKED
        assert await lease.closed is LeaseOutcome.PEER_LOST
        assert (await fetch.result).failure is not None


async def test_an_owner_of_an_older_version_is_not_asked(monkeypatch) -> None:
    monkeypatch.setattr("kvstore.exchange.handshake.FEATURES", ())
    owner, reader = make_pair()
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        assert (await take(reader, [1, 2, 3, 4]).result).failure.cause is FetchCause.ABORTED
        assert reader.exchange.is_connected("decode-0")
