"""The thread that owns a NIXL agent, over an agent that fails where it is told to: nothing is lost by it for good."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvstore.block import HostMemory
from kvstore.errors import IncompatiblePeer, ReadFailed, TransportError
from kvstore.exchange import BlockExchange, PeerIdentity
from kvstore.transport import nixl as nixl_transport
from kvstore.transport import nixl_agent, nixl_pool
from kvstore.transport.base import LinkPeer
from kvstore.transport.nixl_agent import AgentThread
from kvstore.transport.nixl_pool import PoolAddress, Remote
from tests.proofs import KEY
from tests.store_node.store_world import LAYOUT, PATIENT, until

pytest.importorskip("nixl_cu13")


class Nixl:
    """What all agents of a test share: what fails, and how often; and the state of every transfer."""

    def __init__(self) -> None:
        self.fails: Counter[str] = Counter()  # calls of these still to fail
        self.states: dict[int, str] = {}
        self.numbers = itertools.count()
        self.num_agents = 0
        self.num_polls = 0
        self.copies_at_once = False
        self.backends: list[tuple[str, dict[str, str]]] = []

    def call(self, name: str) -> int:
        if self.fails[name]:
            self.fails[name] -= 1
            raise RuntimeError(f"{name} fails")
        return next(self.numbers)

    def make(self, name: str, config: object) -> FakeAgent:
        self.call("make")
        self.num_agents += 1
        return FakeAgent(self, name)


class FakeAgent:
    """Transfers begin in state PROC and stay there until the test says otherwise, unless they are done at once."""

    def __init__(self, nixl: Nixl, name: str) -> None:
        self.agent = object()  # the binding
        self.name = name
        self._nixl = nixl

    def create_backend(self, name: str, settings: dict[str, str]) -> None:
        self._nixl.backends.append((name, settings))

    def get_agent_metadata(self) -> bytes:
        return self.name.encode()

    def add_remote_agent(self, metadata: bytes) -> str:
        return metadata.decode()

    def get_new_notifs(self) -> None:
        self._nixl.num_polls += 1

    def make_prepped_xfer(self, *_: object) -> int:
        return self._nixl.call("make_prepped_xfer")

    def transfer(self, handle: int) -> str:
        self._nixl.states[handle] = "DONE" if self._nixl.copies_at_once else "PROC"
        return self._nixl.states[handle]

    def check_xfer_state(self, handle: int) -> str:
        state = self._nixl.states[handle]
        if state == "BROKEN":
            raise RuntimeError("the transfer broke")
        return state

    def register_memory(self, *_: object) -> int:
        return self._nixl.call("register_memory")

    def prep_xfer_dlist(self, *_: object) -> int:
        return self._nixl.call("prep_xfer_dlist")

    def make_connection(self, _: str) -> None: ...

    def release_xfer_handle(self, handle: int) -> None:
        self._nixl.call("release_xfer_handle")

    def release_dlist_handle(self, handle: int) -> None:
        self._nixl.call("release_dlist_handle")

    def deregister_memory(self, handle: int) -> None:
        self._nixl.call("deregister_memory")


@asynccontextmanager
async def running(nixl: Nixl) -> AsyncIterator[AgentThread]:
    agent_class: Any = nixl.make
    thread = AgentThread(agent_class, "test", HostMemory.allocate(8, 512))
    await asyncio.wrap_future(thread.start())
    try:
        yield thread
    finally:
        await asyncio.wait_for(asyncio.wrap_future(thread.stop()), 20)


def peer() -> PoolAddress:
    return PoolAddress(b"peer", "DRAM", 0, 4096, 8, 512, 8192, bytes(16))


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "_FIRST_RETRY_S", 0.01)


async def test_each_agent_reads_over_ucx_without_keep_alives_unless_the_user_has_set_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A read would wait for the one that went before it, and that for an owner's agent that hardly ever comes round.
    monkeypatch.delenv("UCX_KEEPALIVE_INTERVAL", raising=False)
    nixl = Nixl()
    async with running(nixl):
        assert nixl.backends == [("UCX", {"engine_config": "KEEPALIVE_INTERVAL=inf"})]
    monkeypatch.setenv("UCX_KEEPALIVE_INTERVAL", "5s")
    async with running(nixl):
        assert nixl.backends[1:] == [("UCX", {})]


async def test_a_release_that_raises_loses_no_other_read() -> None:
    nixl = Nixl()
    async with running(nixl) as thread, asyncio.timeout(20):
        remote = await asyncio.wrap_future(thread.add_remote(peer()))
        reads = [asyncio.wrap_future(thread.read(remote, [i], [i])) for i in range(4)]
        await until(lambda: len(nixl.states) == 4)
        nixl.fails["release_xfer_handle"] = 2
        first, second, third, last = nixl.states
        nixl.states |= {first: "DONE", second: "BROKEN", third: "DONE"}
        await reads[0]
        with pytest.raises(ReadFailed, match="the transfer broke"):
            await reads[1]
        await reads[2]
        nixl.states[last] = "DONE"
        await reads[3]
        assert nixl.num_agents == 1


def peer_in_pieces() -> PoolAddress:
    """Each of its blocks is eight descriptors."""
    return PoolAddress(
        b"peer", "DRAM", 0, 4096, 8, 512, 8192, bytes(16), num_pieces=8, piece_stride=512, block_stride=64
    )


async def next_part(nixl: Nixl, num_before: int) -> int:
    """Wait until so many transfers have been posted, and one more; return it."""
    await until(lambda: len(nixl.states) > num_before)
    assert len(nixl.states) == num_before + 1, "one at a time"
    return list(nixl.states)[-1]


@pytest.mark.parametrize("how", ["well", "broken", "cannot be made", "given up", "agent reset"])
async def test_a_read_of_many_pieces_is_posted_part_after_part_and_ends_once(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(nixl_pool, "_MAX_POSTED", 16)
    nixl = Nixl()
    async with running(nixl) as thread, asyncio.timeout(20):
        remote = await asyncio.wrap_future(thread.add_remote(peer_in_pieces()))
        reading = asyncio.wrap_future(thread.read(remote, range(8), range(8)))  # four parts
        nixl.states[await next_part(nixl, 0)] = "DONE"
        second = await next_part(nixl, 1)
        match how:
            case "well":
                nixl.states[second] = "DONE"
                nixl.states[await next_part(nixl, 2)] = "DONE"
                last = await next_part(nixl, 3)
                assert not reading.done()
                nixl.states[last] = "DONE"
                await reading
                return
            case "broken":
                nixl.states[second] = "BROKEN"
            case "cannot be made":
                nixl.fails["make_prepped_xfer"] = 1
                nixl.states[second] = "DONE"
            case "given up":  # a link that was aborted reads no further, and costs nobody else's reads
                thread.give_up(remote, 600.0)
                await asyncio.wrap_future(thread.add_remote(peer()))  # the thread has heard of it
                nixl.states[second] = "DONE"
            case "agent reset":
                thread.give_up(remote, 0.0)
        said = {"broken": "broke", "cannot be made": "fails", "given up": "given up", "agent reset": "was reset"}[how]
        with pytest.raises(ReadFailed, match=said):
            await reading
        await until(lambda: nixl.num_agents == (2 if how == "agent reset" else 1))
        assert len(nixl.states) == 2


async def test_a_read_whose_parts_are_done_as_they_are_posted_ends_with_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nixl_pool, "_MAX_POSTED", 1)
    nixl = Nixl()
    nixl.copies_at_once = True
    async with running(nixl) as thread, asyncio.timeout(20):
        remote = await asyncio.wrap_future(thread.add_remote(peer_in_pieces()))
        await asyncio.wrap_future(thread.read(remote, range(8), range(8)))
        assert len(nixl.states) == 64


@pytest.mark.parametrize("ends", ["DONE", "BROKEN"])
async def test_who_reads_hears_once_that_all_parts_have_landed_before_the_read_ends_and_never_of_one_that_broke(
    monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    monkeypatch.setattr(nixl_pool, "_MAX_POSTED", 16)
    nixl = Nixl()
    heard: list[tuple[int, bool, str]] = []
    async with running(nixl) as thread, asyncio.timeout(20):
        remote = await asyncio.wrap_future(thread.add_remote(peer_in_pieces()))
        is_known = threading.Event()

        def landed() -> None:
            is_known.wait(20)
            heard.append((len(nixl.states), done.done(), threading.current_thread().name))

        done = thread.read(remote, range(8), range(8), landed)  # four parts
        reading = asyncio.wrap_future(done)
        is_known.set()
        for number in range(3):
            nixl.states[await next_part(nixl, number)] = "DONE"
        nixl.states[await next_part(nixl, 3)] = ends
        if ends == "DONE":
            await reading
            assert heard == [(4, False, "kv-nixl")]
        else:
            with pytest.raises(ReadFailed, match="the transfer broke"):
                await reading
            assert heard == []


async def test_a_reset_that_fails_ends_its_reads_and_is_tried_until_an_agent_lives() -> None:
    nixl = Nixl()
    async with running(nixl) as thread, asyncio.timeout(20):
        remote = await asyncio.wrap_future(thread.add_remote(peer()))
        reads = [asyncio.wrap_future(thread.read(remote, [i], [i])) for i in range(2)]
        await until(lambda: len(nixl.states) == 2)
        for name in ("release_xfer_handle", "release_dlist_handle", "deregister_memory"):
            nixl.fails[name] = 1
        nixl.fails |= Counter(make=2, register_memory=1, prep_xfer_dlist=1)
        thread.give_up(remote, 0.0)
        for reading in reads:
            with pytest.raises(ReadFailed, match="the agent was reset"):
                await reading
        await until(lambda: thread.problem is None)
        assert (nixl.num_agents, sum(nixl.fails.values())) == (4, 0)  # one lived at first, two died young
        with pytest.raises(TransportError, match="reset since"):
            await asyncio.wrap_future(thread.read(remote, [0], [0]))
        remote = await asyncio.wrap_future(thread.add_remote(peer()))
        num_known = len(nixl.states)
        reading = asyncio.wrap_future(thread.read(remote, [0], [0]))
        await until(lambda: len(nixl.states) > num_known)
        nixl.states[list(nixl.states)[-1]] = "DONE"
        await reading


async def test_owners_that_are_read_no_more_are_remembered_up_to_a_number_and_dropped_where_they_broke(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nixl_agent, "_MAX_FORMER", 2)
    forgotten: list[str] = []
    monkeypatch.setattr(FakeAgent, "remove_remote_agent", lambda _, name: forgotten.append(name), raising=False)
    async with running(Nixl()) as thread, asyncio.timeout(20):

        async def link(name: bytes, is_sound: bool = True) -> bool:
            address = PoolAddress(name, "DRAM", 0, 4096, 8, 512, 8192, bytes(16))
            remote = await asyncio.wrap_future(thread.add_remote(address))
            await asyncio.wrap_future(thread.remove_remote(remote, is_sound))
            return remote.is_former

        assert [await link(name) for name in (b"a", b"b", b"a", b"c", b"b")] == [False, False, True, False, False]
        assert forgotten == ["b", "a"]
        assert await link(b"c", is_sound=False)
        assert forgotten == ["b", "a", "c"]
        assert not await link(b"c")


async def test_an_agent_that_does_not_answer_holds_up_no_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    agent_class: Any = Nixl().make
    monkeypatch.setattr(nixl_transport, "_import_nixl", lambda: agent_class)
    monkeypatch.setattr(nixl_transport, "_MAX_STOP_S", 0.05)
    transport = nixl_transport.NixlTransport(HostMemory.allocate(8, 512), "test")
    await transport.start()
    remote = await asyncio.wrap_future(transport._thread.add_remote(peer()))
    transport._links.add(nixl_transport.NixlLink(transport._thread, "peer", "tcp", remote, transport._links))
    may_go_on, is_stuck = threading.Event(), threading.Event()

    def hang(_: object) -> None:
        is_stuck.set()
        may_go_on.wait()

    monkeypatch.setattr(FakeAgent, "make_connection", lambda _, name: hang(name))
    try:
        transport._thread.add_remote(PoolAddress(b"another", "DRAM", 0, 4096, 8, 512, 8192, bytes(16)))
        await until(is_stuck.is_set)
        await asyncio.wait_for(transport.close(), 20)
    finally:
        may_go_on.set()
    await asyncio.wait_for(asyncio.wrap_future(transport._thread.stop()), 20)


async def test_the_thread_comes_round_whatever_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A time-out that is over by the time it is looked at again, as any may be on a busy machine.
    for name in ("_BUSY_POLL_S", "_SLOW_POLL_S", "_IDLE_POLL_S"):
        monkeypatch.setattr(nixl_agent, name, 1e-6)
    async with running(Nixl()) as thread:
        for _ in range(2000):
            for _ in range(4):
                thread.give_up(Remote("nobody", 0), 1.0)
            await asyncio.sleep(0)
            before = thread.num_turns
            await until(lambda before=before: thread.num_turns > before)  # type: ignore[misc]


async def test_an_agent_comes_round_by_itself_while_a_reader_depends_on_it_and_else_waits_for_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nixl_agent, "_IDLE_POLL_S", 3600.0)
    monkeypatch.setattr(nixl_agent, "_SETTLE_S", 0.0)
    nixl = Nixl()
    nixl.copies_at_once = True
    async with running(nixl) as thread, asyncio.timeout(20):
        remote = await asyncio.wrap_future(thread.add_remote(peer()))
        for _ in range(20):
            await asyncio.wrap_future(thread.read(remote, [0], [0]))
        assert nixl.num_polls <= 22  # one at most for each command

        thread.reader_came(is_driven=False)
        thread.reader_came(is_driven=True)
        before = nixl.num_polls
        await until(lambda: nixl.num_polls > before + 20)

        thread.reader_left(was_driven=True)
        await asyncio.wrap_future(thread.read(remote, [0], [0]))  # it has heard of it
        before = nixl.num_polls
        for _ in range(20):
            await asyncio.wrap_future(thread.read(remote, [0], [0]))
        assert nixl.num_polls <= before + 21


async def test_an_agent_comes_round_by_itself_while_connections_are_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "_IDLE_POLL_S", 3600.0)
    nixl = Nixl()
    async with running(nixl) as thread, asyncio.timeout(20):
        thread.reader_came(is_driven=False)
        await until(lambda: nixl.num_polls > 20)


@pytest.mark.parametrize(("lane", "is_driven"), [("cma", False), ("tcp", True), ("rdma", True), ("", True)])
async def test_an_owner_takes_part_in_reads_unless_it_knows_that_they_go_on_without_it(
    monkeypatch: pytest.MonkeyPatch, lane: str, is_driven: bool
) -> None:
    agent_class: Any = Nixl().make
    monkeypatch.setattr(nixl_transport, "_import_nixl", lambda: agent_class)
    transport = nixl_transport.NixlTransport(HostMemory.allocate(8, 512), "test")
    told: list[tuple[str, bool]] = []
    monkeypatch.setattr(transport._thread, "reader_came", lambda driven: told.append(("came", driven)))
    monkeypatch.setattr(transport._thread, "reader_left", lambda driven: told.append(("left", driven)))
    link = await transport.connect(LinkPeer("reader", b"", bytes(16), "127.0.0.1", False, lane))
    await link.close()
    await link.close()
    assert told == [("came", is_driven), ("left", is_driven)]


class Broken:
    """A transport whose agent is gone."""

    name, two_sided = "broken", False

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def problem(self) -> str | None:
        return "the agent is gone"

    def descriptor(self) -> bytes:
        raise AssertionError("what is broken is not offered")

    def lane_to(self, descriptor: bytes) -> str | None:
        raise AssertionError("what is broken is not chosen")


async def test_a_transport_that_is_broken_is_not_offered_and_the_exchange_says_so() -> None:
    def exchange(name: str) -> BlockExchange:
        broken: Any = Broken()
        identity = PeerIdentity(name, "prefill", "1", LAYOUT)
        return BlockExchange(identity, HostMemory.allocate(4, LAYOUT.block_bytes), [broken], PATIENT, proof_key=KEY)

    ours, theirs = exchange("ours"), exchange("theirs")
    for each in (ours, theirs):
        await each.start("127.0.0.1", 0)
    try:
        with pytest.raises(IncompatiblePeer, match="no KV transport connects us"):
            await ours.connect(theirs.address)
        assert not ours.can_move_blocks
        assert ours.state()["transports"] == {"broken": "the agent is gone"}
    finally:
        for each in (ours, theirs):
            await each.close()
