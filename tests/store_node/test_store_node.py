"""A store node takes in what workers offer, lends it, and loses neither blocks nor slots whatever the workers do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.exchange import PeerIdentity
from kvstore.protocol import FetchCause, Have, Suspect
from kvstore.store import StoreTier, doubts, intake
from tests.memory_transport import Faults, MemoryLink
from tests.store_node.store_world import LAYOUT, PATIENT, chain, idle, until, world
from tests.tiers.blocks import locate


async def test_an_offered_chain_is_pulled_and_lent_byte_for_byte() -> None:
    async with world() as made:
        node, giver, taker = await made.node(), await made.worker(), await made.worker("prefill-1", seed=2)
        hashes = chain("a", 10)
        giver.hold(hashes)
        await giver.offer(node, hashes)
        await idle(node, 1)
        assert made.changes == [(each, StoreTier.DRAM, True) for each in hashes]

        await giver.exchange.close()  # the store lends what its giver no longer can
        result, payloads = await taker.fetch(node, [*hashes, *chain("b", 2)])
        assert result.ok, result.failure
        assert payloads == [giver.bytes_of(each) for each in hashes]
        await until(lambda: node.lender.num_lent == 0)
        node.check_integrity()


async def test_a_store_keeps_whole_blocks_of_workers_that_have_them_in_pieces() -> None:
    async with world() as made:
        node = await made.node()
        giver, taker = await made.worker(num_pieces=16), await made.worker("prefill-1", seed=2, num_pieces=4)
        hashes = chain("a", 10)
        giver.hold(hashes)
        await giver.offer(node, hashes)
        await idle(node, 1)
        result, payloads = await taker.fetch(node, hashes)
        assert result.ok, result.failure
        assert payloads == [giver.bytes_of(each) for each in hashes]


async def test_a_chain_that_grows_is_pulled_only_where_it_is_new() -> None:
    async with world() as made:
        node, giver = await made.node(), await made.worker()
        hashes = chain("a", 8)
        giver.hold(hashes)
        await giver.offer(node, hashes[:5])
        await idle(node, 1)
        await giver.offer(node, hashes[:5])
        await giver.offer(node, hashes)
        await idle(node, 3)
        assert [each for wanted in giver.wanted for each in wanted] == hashes
        stats = node.intake.stats
        assert (stats.num_offers, stats.num_offers_known, stats.num_pulled_blocks) == (3, 1, 8)
        assert [node.store.dram.find(each).parent_hash for each in hashes] == [None, *hashes[:-1]]


async def test_the_same_chain_offered_by_many_is_pulled_once() -> None:
    async with world() as made:
        node = await made.node()
        givers = [await made.worker(f"prefill-{i}", seed=i) for i in range(3)]
        hashes = chain("a", 4)
        for giver in givers:
            giver.may_lend.clear()
            giver.hold(hashes)
            await giver.offer(node, hashes)
        await until(lambda: node.intake.stats.num_offers == 3 and any(giver.wanted for giver in givers))
        for giver in givers:
            giver.may_lend.set()
        await idle(node, 3)
        assert sum(len(giver.wanted) for giver in givers) == 1
        assert node.intake.stats.num_pulled_blocks == 4
        node.check_integrity()


async def test_the_middle_of_a_chain_is_pulled_only_where_its_head_is() -> None:
    async with world() as made:
        node, giver = await made.node(), await made.worker()
        hashes = chain("a", 6)
        giver.hold(hashes)
        await giver.offer(node, hashes[3:], parent=hashes[2])
        await idle(node, 1)
        assert (node.intake.stats.num_orphans, len(node.store.dram)) == (1, 0)
        await giver.offer(node, hashes[:3])
        await idle(node, 2)
        await giver.offer(node, hashes[3:], parent=hashes[2])
        await idle(node, 3)
        assert locate(node.store, hashes) == [StoreTier.DRAM] * 6


async def test_what_a_liar_gave_is_found_out_by_its_first_reader_and_dropped_from_both_tiers(tmp_path: Path) -> None:
    async with world() as made:
        node, liar = await made.node(disk=tmp_path), await made.worker(lies=True)
        honest, reader = await made.worker("prefill-1", seed=2), await made.worker("decode-0")
        hashes = chain("a", 4)
        for worker in (liar, honest):
            worker.hold(hashes)
        await liar.offer(node, hashes)
        await idle(node, 1)
        assert await node.store.flush(20)
        result, _ = await reader.fetch(node, hashes)
        assert result.failure.cause is FetchCause.DIGEST_MISMATCH
        await until(lambda: node.lender.num_refuted == 4)
        assert (locate(node.store, hashes), node.lender.num_corrupt) == ([], 0)
        await until(lambda: node.lender.num_lent == 0)
        assert node.store.dram.num_free == 32
        await honest.offer(node, hashes)
        await idle(node, 2)
        result, payloads = await reader.fetch(node, hashes)
        assert result.ok, result.failure
        assert payloads == [honest.bytes_of(each) for each in hashes]
        await until(lambda: node.lender.num_lent == 0)
        assert await node.store.flush(20)
        node.check_integrity()


async def test_what_is_offered_while_it_is_doubted_comes_in_when_the_wrong_blocks_are_gone() -> None:
    """Whoever reads them here computes them, and offers what it computed, perhaps before they are dropped."""
    async with world() as made:
        node, liar, honest = await made.node(), await made.worker(lies=True), await made.worker("prefill-1", seed=2)
        hashes = chain("a", 4)
        for worker in (liar, honest):
            worker.hold(hashes)
        await liar.offer(node, hashes)
        await idle(node, 1)
        doubting = asyncio.create_task(node.lender.recheck(hashes))
        await asyncio.sleep(0)
        assert locate(node.store, hashes) == [StoreTier.DRAM] * 4
        have = Have(honest.exchange.address, None, list(hashes))
        node.intake.offered(honest.exchange.identity, have)
        await doubting
        await until(lambda: node.intake.stats.num_pulled_blocks == 8)
        await idle(node, 2)
        result, payloads = await liar.fetch(node, hashes)
        assert result.ok, result.failure
        assert payloads == [honest.bytes_of(each) for each in hashes]
        node.check_integrity()


async def test_what_is_offered_in_one_breath_with_the_doubt_comes_in_too() -> None:
    """A node that did not run for a moment finds both messages at once."""
    async with world() as made:
        node, liar, honest = await made.node(), await made.worker(lies=True), await made.worker("prefill-1", seed=2)
        hashes = chain("a", 4)
        for worker in (liar, honest):
            worker.hold(hashes)
        await liar.offer(node, hashes)
        await idle(node, 1)
        connection = honest.exchange._owner(await honest.exchange.connect(node.exchange.address), "the test")
        connection.send(Suspect(hashes))
        await honest.offer(node, hashes)
        await until(lambda: node.intake.stats.num_pulled_blocks == 8)
        await idle(node, 2)
        assert locate(node.store, hashes) == [StoreTier.DRAM] * 4


async def test_who_lies_about_blocks_has_few_of_them_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubts, "MOST_AT_ONCE", 3)
    monkeypatch.setattr(doubts, "PER_S", 0.0)
    async with world() as made:
        node, giver = await made.node(), await made.worker()
        hashes = chain("a", 8)
        giver.hold(hashes)
        await giver.offer(node, hashes)
        await idle(node, 1)
        await node.lender.recheck(chain("b", 9))  # nothing here: nothing used up
        for _ in range(2):
            await node.lender.recheck(hashes)
        tiers = [node.store.tier_of(each) for each in hashes]
        assert tiers == [None] * 3 + [StoreTier.DRAM] * 5, "the first of a chain, without which nobody wants the rest"
        assert (node.lender.num_refuted, node.lender.num_kept) == (3, 10)

        (changed,) = node.store.dram.pin(hashes[-1:], is_use=False)
        node.store.dram.release([changed.slot])
        node.store.memory.view(changed.slot)[5] ^= 1
        await node.lender.recheck(hashes[-1:])
        assert (node.store.tier_of(hashes[-1]), node.lender.num_corrupt) == (None, 1), "what has changed always goes"


def test_doubts_are_heard_again_after_a_while() -> None:
    now_s = 100.0
    heard = doubts.Doubts(lambda: now_s)
    assert [heard.take(200), heard.take(200)] == [200, doubts.MOST_AT_ONCE - 200]
    now_s += 2.5
    assert heard.take(200) == 10
    now_s += 1e6
    assert heard.take(1000) == doubts.MOST_AT_ONCE


async def test_bytes_that_change_on_their_way_in_are_found_by_their_first_reader_and_dropped() -> None:
    async with world() as made:
        node, giver = await made.node(faults=Faults(corrupt=1.0)), await made.worker()
        hashes = chain("a", 4)
        giver.hold(hashes)
        await giver.offer(node, hashes)
        await idle(node, 1)
        result, _ = await giver.fetch(node, hashes)
        assert result.failure.cause is FetchCause.DIGEST_MISMATCH
        await until(lambda: node.lender.num_refuted > 0)
        assert len(locate(node.store, hashes)) < 4


async def test_an_address_that_is_somebody_elses_is_not_read_from() -> None:
    async with world() as made:
        node, giver, other = await made.node(), await made.worker(), await made.worker("prefill-1")
        await giver.offer(node, chain("a", 2), address=other.exchange.address)
        await idle(node, 1)
        assert dict(node.intake.stats.failures) == {"impostor": 1}
        assert other.wanted == []


async def test_an_offer_of_what_was_evicted_meanwhile_brings_the_part_that_is_left() -> None:
    async with world() as made:
        node, giver = await made.node(), await made.worker()
        hashes = chain("a", 6)
        giver.hold(hashes[:2])
        await giver.offer(node, hashes)
        await idle(node, 1)
        assert locate(node.store, hashes) == [StoreTier.DRAM] * 2
        assert node.store.dram.num_empty == 30


@pytest.mark.parametrize("faults", [Faults(stall=1.0), Faults(fail=1.0), Faults(cut=1.0)])
async def test_reads_that_go_wrong_cost_no_slot(faults: Faults) -> None:
    async with world() as made:
        node, giver = await made.node(faults=faults, timeouts=replace(PATIENT, read_s=0.5)), await made.worker()
        hashes = chain("a", 4)
        giver.hold(hashes)
        await giver.offer(node, hashes)
        await idle(node, 1)
        assert sum(node.intake.stats.failures.values()) == 1
        assert (len(node.store.dram), node.store.dram.num_free) == (0, 32)
        node.check_integrity()


async def test_a_worker_that_dies_while_it_lends_costs_no_slot() -> None:
    async with world() as made:
        node, giver = await made.node(), await made.worker()
        giver.may_lend.clear()
        giver.hold(chain("a", 4))
        await giver.offer(node, chain("a", 4))
        await until(lambda: bool(giver.wanted))
        giver.may_lend.set()
        await giver.exchange.close()
        await idle(node, 1)
        assert node.store.dram.num_private == 0
        node.check_integrity()


async def test_a_chain_longer_than_the_memory_is_kept_as_far_as_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_MAX_PULLS", 1)
    async with world() as made:
        node, giver = await made.node(num_slots=8), await made.worker()
        old, hashes = chain("old", 6), chain("a", 20)
        giver.hold([*old, *hashes])
        await giver.offer(node, old)
        await idle(node, 1)
        await giver.offer(node, hashes)
        await idle(node, 2)
        assert locate(node.store, hashes) == [StoreTier.DRAM] * 8, "the chain pushes others out, never its own head"
        assert locate(node.store, old) == []
        node.check_integrity()


async def test_of_too_many_offers_the_oldest_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_MAX_PULLS", 1)
    monkeypatch.setattr(intake, "_MAX_QUEUED", 2)
    async with world() as made:
        node, giver = await made.node(), await made.worker()
        chains = [chain(name, 2) for name in "abcde"]
        giver.may_lend.clear()
        for hashes in chains:
            giver.hold(hashes)
            await giver.offer(node, hashes)
            await until(lambda: bool(giver.wanted))
        await until(lambda: node.intake.stats.num_offers == 5)
        giver.may_lend.set()
        await idle(node, 5)
        assert node.intake.stats.num_offers_dropped == 2
        assert [len(locate(node.store, hashes)) for hashes in chains] == [2, 0, 0, 2, 2]


async def test_a_restarted_node_lends_from_its_disk_what_it_kept(tmp_path: Path) -> None:
    async with world() as made:
        node, giver = await made.node(disk=tmp_path), await made.worker()
        hashes = chain("a", 6)
        giver.hold(hashes)
        await giver.offer(node, hashes)
        await idle(node, 1)
        await node.close()

        again, taker = await made.node(disk=tmp_path, incarnation="2"), await made.worker("prefill-1", seed=2)
        assert locate(again.store, hashes) == [StoreTier.DISK] * 6
        await giver.offer(again, hashes)
        await idle(again, 1)
        assert again.intake.stats.num_offers_known == 1, "what is on disk need not be pulled"
        result, payloads = await taker.fetch(again, hashes)
        assert result.ok, result.failure
        assert payloads == [giver.bytes_of(each) for each in hashes]
        await until(lambda: again.lender.num_lent == 0)


async def test_a_flipped_byte_in_memory_is_found_by_the_reader_and_the_disks_copy_serves_the_next(
    tmp_path: Path,
) -> None:
    async with world() as made:
        node, giver = await made.node(disk=tmp_path), await made.worker()
        hashes = chain("a", 4)
        giver.hold(hashes)
        await giver.offer(node, hashes)
        await idle(node, 1)
        assert await node.store.flush(20)
        node.store.memory.view(node.store.dram.find(hashes[2]).slot)[5] ^= 1

        result, _ = await giver.fetch(node, hashes)
        assert result.failure.cause is FetchCause.DIGEST_MISMATCH
        await until(lambda: node.lender.num_lent == 0 and node.lender.num_corrupt == 1)
        assert (node.lender.num_refuted, locate(node.store, hashes)[2]) == (0, StoreTier.DISK)
        result, payloads = await giver.fetch(node, hashes)
        assert result.ok, result.failure
        assert payloads == [giver.bytes_of(each) for each in hashes]


async def test_closing_while_blocks_come_in_gives_every_slot_back() -> None:
    async with world() as made:
        node, giver = await made.node(), await made.worker()
        giver.may_lend.clear()
        giver.hold(chain("a", 4))
        await giver.offer(node, chain("a", 4))
        await until(lambda: bool(giver.wanted))
        await node.close()
        assert node.intake.is_idle
        assert node.store.dram.num_private == 0
        giver.may_lend.set()


async def test_the_block_that_an_offer_goes_on_from_is_not_evicted_for_it() -> None:
    async with world() as made:
        node, giver = await made.node(num_slots=8), await made.worker()
        head, tail, others = chain("head", 1), chain("tail", 2), chain("other", 7)
        giver.hold([*head, *others, *tail])
        await giver.offer(node, head)
        await idle(node, 1)
        for number, other in enumerate(others):
            await giver.offer(node, [other])
            await idle(node, 2 + number)
        await giver.offer(node, tail, parent=head[0])
        await idle(node, 9)
        assert locate(node.store, [*head, *tail]) == [StoreTier.DRAM] * 3


async def test_a_chain_that_grows_while_it_waits_is_one_offer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with mute_address() as address, world() as made:
        node = await made.node()
        vanished = PeerIdentity("vanished/1", "prefill", "1", LAYOUT)
        hashes = chain("a", 40)
        for length in range(1, 41):
            node.intake.offered(vanished, Have(address, None, list(hashes[:length])))
        node.intake.offered(vanished, Have(address, hashes[-1], list(chain("b", 2))))
        node.intake.offered(vanished, Have(address, None, list(hashes[:20] + chain("c", 2))))
        assert node.intake.num_queued == 3
        assert node.intake.stats.num_offers_dropped == 0


async def test_a_worker_ignores_what_is_offered_to_it() -> None:
    async with world() as made:
        giver, other = await made.worker(), await made.worker("prefill-1")
        peer_id = await giver.exchange.connect(other.exchange.address)
        giver.exchange.tell_have(peer_id, giver.exchange.address, None, chain("a", 2))
        assert await giver.exchange.connect(other.exchange.address) == peer_id
        assert giver.exchange.is_connected(peer_id)


@asynccontextmanager
async def mute_address() -> AsyncIterator[str]:
    """Where somebody listens and never says a word: what a host that vanished looks like until a timeout passes."""

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.close()


async def test_the_offers_of_vanished_hosts_hold_nobody_elses() -> None:
    """A dial takes twenty seconds to give up here: what comes earlier was not behind one."""
    async with mute_address() as address, world() as made:
        node, giver = await made.node(), await made.worker()
        for host in range(10):
            vanished = PeerIdentity(f"vanished-{host}/1", "prefill", "1", LAYOUT)
            for number in range(20):
                node.intake.offered(vanished, Have(address, None, list(chain(f"{host}.{number}", 2))))
        hashes = chain("a", 4)
        giver.hold(hashes)
        await giver.offer(node, hashes)
        await until(lambda: locate(node.store, hashes) == [StoreTier.DRAM] * 4, timeout_s=15.0)
        assert (node.intake.num_queued, dict(node.intake.stats.failures)) == (200, {})


async def test_a_vanished_host_is_dialled_once_for_all_that_it_has_offered() -> None:
    async with mute_address() as address, world() as made:
        node = await made.node(timeouts=replace(PATIENT, connect_s=0.2))
        vanished = PeerIdentity("vanished/1", "prefill", "1", LAYOUT)
        for number in range(200):
            node.intake.offered(vanished, Have(address, None, list(chain(str(number), 2))))
        await idle(node, 200)
        assert dict(node.intake.stats.failures) == {"unreachable": 200}


async def test_a_chain_that_a_dead_worker_was_to_give_is_taken_from_the_next_that_has_offered_it() -> None:
    async with world() as made:
        node, dying, other = await made.node(), await made.worker(), await made.worker("prefill-1", seed=2)
        hashes = chain("a", 4)
        for worker in (dying, other):
            worker.hold(hashes)
        dying.may_lend.clear()
        await dying.offer(node, hashes)
        await until(lambda: bool(dying.wanted))
        await other.offer(node, hashes)
        await until(lambda: node.intake.num_queued == 1)
        closing = asyncio.create_task(dying.exchange.close())
        await asyncio.sleep(0)
        dying.may_lend.set()
        await closing
        await idle(node, 2)
        slots = [node.store.dram.find(each).slot for each in hashes]
        assert [node.store.memory.view(slot).tobytes() for slot in slots] == [other.bytes_of(e) for e in hashes]


async def test_a_read_that_never_ends_does_not_keep_what_is_here_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_SETTLE_S", 0.2)
    async with world() as made:
        node, giver = await made.node(disk=tmp_path), await made.worker()
        here, stuck = chain("here", 3), chain("stuck", 3)
        giver.hold([*here, *stuck])
        await giver.offer(node, here)
        await idle(node, 1)
        reads: list[asyncio.Future[None]] = []

        def never(link: MemoryLink, read_id: int, runs: object, landed: object) -> asyncio.Future[None]:
            reads.append(asyncio.get_running_loop().create_future())
            return reads[-1]

        monkeypatch.setattr(MemoryLink, "read", never)
        await giver.offer(node, stuck)
        await until(lambda: bool(reads))
        await node.close()
        again = await made.node(disk=tmp_path, incarnation="2")
        assert locate(again.store, here) == [StoreTier.DISK] * 3
