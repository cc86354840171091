"""What the block protocol relies on, asked of every transport."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from kvstore.block import coalesce
from kvstore.errors import TransportError
from tests.exchange.transport_peer import BLOCK_BYTES, NUM_BLOCKS, TransportPeer, content
from tests.held_threads import held, ucx_thread
from tests.memory_transport import Faults, MemoryTransport, Switchboard

REPOSITORY = Path(__file__).parents[2]
BOUND_S = 20.0  # "in bounded time", on a machine that does other things too


class ChildPeer:
    """A `TransportPeer` in a process of its own."""

    def __init__(self, transport: str, num_pieces: int, environment: dict[str, str] | None = None) -> None:
        self._transport = transport
        self._num_pieces = num_pieces
        self._environment = {**os.environ, **(environment or {})}
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}

    async def spawn(self) -> None:
        connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()
        server = await asyncio.start_server(lambda r, w: connected.set_result((r, w)), "127.0.0.1", 0, limit=1 << 24)
        port = server.sockets[0].getsockname()[1]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.exchange.transport_peer", self._transport, str(port), str(self._num_pieces)),
            cwd=REPOSITORY,
            env=self._environment,
        )
        ended = asyncio.ensure_future(self.process.wait())
        await asyncio.wait([connected, ended], timeout=60, return_when=asyncio.FIRST_COMPLETED)
        server.close()
        assert connected.done(), f"the peer's process did not report: exit status {self.process.returncode}"
        self._reader, self._writer = connected.result()
        ended.cancel()
        self._receiving = asyncio.ensure_future(self._receive())

    async def _receive(self) -> None:
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(4), "big")
                number, answer, problem = msgspec.msgpack.decode(await self._reader.readexactly(size))
                future = self._answers.pop(number)
                if future.done():
                    continue  # whoever asked has run out of time: that is the test's failure, and not this answer
                if problem is not None and problem.startswith("NOT A"):
                    future.set_exception(AssertionError(problem))
                elif problem is not None:
                    future.set_exception(TransportError(problem))
                else:
                    future.set_result(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            for future in (each for each in self._answers.values() if not each.done()):
                future.set_exception(EOFError("the peer's process has ended"))
                future.exception()

    def __getattr__(self, order: str) -> Callable[..., Awaitable[Any]]:
        def ask(*arguments: Any) -> asyncio.Future[Any]:
            number = next(self._numbers)
            body = msgspec.msgpack.encode((number, order, arguments))
            self._writer.write(len(body).to_bytes(4, "big") + body)
            self._answers[number] = asyncio.get_running_loop().create_future()
            return self._answers[number]

        return ask

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    async def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    async def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def leave(self) -> int:
        """End the process in the ordinary way; return its exit status."""
        self._writer.close()
        try:
            async with asyncio.timeout(BOUND_S):
                status = await self.process.wait()
        finally:
            if self.process.returncode is None:
                self.process.kill()
                await self.process.wait()
            await self._receiving
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        return status


class LocalPeer(TransportPeer):
    """A peer of the in-memory transport, in this process; others can see neither its death nor its freezing."""

    def __init__(self, switchboard: Switchboard, num_pieces: int) -> None:
        super().__init__(lambda memory: MemoryTransport(memory, switchboard, Faults(max_delay_s=0.001)), num_pieces)
        self.switchboard = switchboard
        self.peers: list[LocalPeer] = []

    async def kill(self) -> None:
        self.switchboard.pull_out(self.transport.descriptor())

    async def freeze(self) -> None:
        for peer in self.peers:
            peer.transport.faults = Faults(stall=1.0)

    async def thaw(self) -> None:
        for peer in self.peers:
            peer.transport.faults = Faults()

    async def leave(self) -> int:
        await self.close()
        return 0


class Pair:
    """Two started peers and what a test does with them."""

    def __init__(self, reader: Any, owner: Any, two_sided: bool) -> None:
        self.reader, self.owner, self.two_sided = reader, owner, two_sided
        self.read_ids = itertools.count(1)

    async def link(self, name: str = "link", reader: Any = None, owner: Any = None) -> str:
        reader, owner = reader or self.reader, owner or self.owner
        link_id = os.urandom(16)
        async with asyncio.timeout(BOUND_S):
            lane, _ = await asyncio.gather(
                reader.connect(name, await owner.descriptor(), link_id, True),
                owner.connect(name, b"", link_id, False),
            )
        return lane

    def start(
        self, remote_ids: list[int], local_ids: list[int], name: str = "link", reader: Any = None, owner: Any = None
    ) -> asyncio.Future[None]:
        """Start a read. Whatever becomes of the owner's part, the reader's is what counts."""
        runs = [
            [run.remote_first, run.local_first, run.num_blocks]
            for run in coalesce(remote_ids, local_ids, max_blocks=64)
        ]
        read_id = next(self.read_ids)
        if self.two_sided:
            serving = asyncio.ensure_future((owner or self.owner).serve(name, read_id, runs))
            serving.add_done_callback(lambda done: done.exception())
        return asyncio.ensure_future((reader or self.reader).read(name, read_id, runs))

    async def pool(self, peer: Any) -> np.ndarray:
        return np.frombuffer(await peer.blocks(), np.uint8).reshape(NUM_BLOCKS, BLOCK_BYTES)


@asynccontextmanager
async def make_pair(
    transport: str, environment: dict[str, str] | None = None, pieces: tuple[int, int] = (1, 1)
) -> AsyncIterator[Pair]:
    """`pieces`: what a block lies in, at the reader and at the owner."""
    if transport == "memory":
        switchboard = Switchboard()
        reader, owner = (LocalPeer(switchboard, num_pieces) for num_pieces in pieces)
        reader.peers, owner.peers = [owner], [reader]
    else:
        reader, owner = (ChildPeer(transport, num_pieces, environment) for num_pieces in pieces)
        await asyncio.gather(reader.spawn(), owner.spawn())
    try:
        two_sided, _ = await asyncio.gather(reader.start(), owner.start())
        await asyncio.gather(reader.fill(1), owner.fill(2))
        yield Pair(reader, owner, two_sided)
    finally:
        await asyncio.gather(reader.leave(), owner.leave())


TRANSPORTS = ["memory", "ucxx", "nixl"]
# What a block lies in, at the reader and at the owner; reads go both ways, and starting processes takes the time.
MIXED = (1, 24)
OTHERS = [pytest.param(pieces, marks=pytest.mark.slow) for pieces in ((24, 24), (3, 2))]


@pytest.fixture(
    params=[*TRANSPORTS, *(pytest.param(f"{name} in pieces", marks=pytest.mark.slow) for name in TRANSPORTS)]
)
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    transport, _, in_pieces = request.param.partition(" in ")
    async with make_pair(transport, pieces=(24, 24) if in_pieces else (1, 1)) as made:
        yield made


@pytest.mark.parametrize("pieces", [(1, 1), MIXED, *OTHERS], ids=lambda pieces: f"{pieces[1]} to {pieces[0]}")
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_blocks_land_exactly_where_they_were_asked_for_and_nowhere_else(transport: str, pieces: tuple[int, int]):
    async with make_pair(
        transport, pieces=pieces
    ) as pair:  # starting processes takes the time, so they serve all three
        await check_every_block_lands_in_its_place(pair)
        await check_many_reads_at_once_in_both_directions_do_not_mix(pair)
        await check_blocks_outside_the_pool_are_refused(pair)


async def check_every_block_lands_in_its_place(pair: Pair) -> None:
    await pair.link("one by one")
    rng, expected = random.Random(7), content(1)
    for num_blocks in (1, 2, 7, 64, 300):
        sources, targets = (rng.sample(range(NUM_BLOCKS), num_blocks) for _ in range(2))
        if num_blocks == 64:
            sources, targets = list(range(100, 164)), [*range(10, 40), *range(50, 84)]  # neighbours move as one piece
        await asyncio.wait_for(pair.start(sources, targets, "one by one"), BOUND_S)
        expected[targets] = content(2)[sources]
    np.testing.assert_array_equal(await pair.pool(pair.reader), expected)
    np.testing.assert_array_equal(await pair.pool(pair.owner), content(2))


async def check_many_reads_at_once_in_both_directions_do_not_mix(pair: Pair) -> None:
    await asyncio.gather(pair.reader.fill(1), pair.owner.fill(2))
    await pair.link("there")
    await pair.link("back", reader=pair.owner, owner=pair.reader)
    order = random.Random(8).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    sources, targets = order[: NUM_BLOCKS // 2], order[NUM_BLOCKS // 2 :]  # nobody reads what is being written
    reads = []
    for i, (source, target) in enumerate(zip(sources[:100], targets[:100], strict=True)):
        reads.append(pair.start([source], [target], "there"))
        if i % 10 == 0:
            ends = slice(100 + i // 2, 105 + i // 2)
            reads.append(pair.start(sources[ends], targets[ends], "back", pair.owner, pair.reader))
    await asyncio.wait_for(asyncio.gather(*reads), BOUND_S)
    expected_here, expected_there = content(1), content(2)
    expected_here[targets[:100]] = content(2)[sources[:100]]
    expected_there[targets[100:150]] = content(1)[sources[100:150]]
    np.testing.assert_array_equal(await pair.pool(pair.reader), expected_here)
    np.testing.assert_array_equal(await pair.pool(pair.owner), expected_there)


async def check_blocks_outside_the_pool_are_refused(pair: Pair) -> None:
    await pair.reader.fill(1)
    await pair.link("outside")
    for remote_id, local_id in ((NUM_BLOCKS, 0), (0, NUM_BLOCKS)):
        if pair.two_sided and remote_id == NUM_BLOCKS:
            continue  # the owner's lease refuses it before any transport hears of it
        with pytest.raises(TransportError):
            await asyncio.wait_for(pair.start([remote_id], [local_id], "outside"), BOUND_S)
    np.testing.assert_array_equal(await pair.pool(pair.reader), content(1))


async def test_a_read_under_way_from_a_killed_peer_ends_with_an_error_in_bounded_time(pair: Pair):
    await pair.link()
    await pair.owner.freeze()
    reading = pair.start(list(range(300)), list(range(300)))
    await asyncio.sleep(0.1)
    await pair.owner.kill()
    await pair.reader.abort("link")  # as the connection's end does
    await asyncio.wait([reading], timeout=BOUND_S)
    assert reading.done()
    if reading.exception() is None:  # one-sided reads need no living owner, only its memory
        np.testing.assert_array_equal((await pair.pool(pair.reader))[:300], content(2)[:300])
    with pytest.raises(TransportError):
        await asyncio.wait_for(pair.start([0], [0]), BOUND_S)
    await asyncio.wait_for(pair.reader.close_link("link"), BOUND_S)


async def test_connecting_to_a_dead_peer_fails_in_bounded_time(pair: Pair):
    descriptor = await pair.owner.descriptor()
    await pair.owner.kill()
    with pytest.raises(TransportError):
        await asyncio.wait_for(pair.reader.connect("link", descriptor, os.urandom(16), True), BOUND_S)


async def test_after_an_abort_no_late_byte_lands(pair: Pair):
    for i in range(3):
        name = f"link-{i}"
        await pair.link(name)
        reading = pair.start(list(range(300)), list(range(299, -1, -1)), name)
        await asyncio.sleep(0.002 * i)
        await pair.reader.abort(name)
        await asyncio.wait([reading], timeout=BOUND_S)
        assert reading.done()
        reading.exception()  # it may have come through before
        await pair.reader.poison(0xEE)
        await asyncio.sleep(0.1)
        assert (await pair.pool(pair.reader) == 0xEE).all()
        await pair.reader.close_link(name)
    await pair.link("afresh")
    await asyncio.wait_for(pair.start([5], [6], "afresh"), BOUND_S)
    np.testing.assert_array_equal((await pair.pool(pair.reader))[6], content(2)[5])


# NIXL over tcp is what stands in here for a fabric on which a read can hang. There a reset reader aborts the owner's
# process, which is why `auto` never takes that lane.
@pytest.mark.parametrize("transport", ["memory", "ucxx", "nixl over tcp"])
async def test_a_read_that_hangs_is_ended_by_abort_and_what_the_frozen_peer_sends_later_lands_nowhere(transport: str):
    name, _, over_tcp = transport.partition(" over ")
    async with make_pair(name, {"UCX_TLS": "tcp,self"} if over_tcp else None) as pair:
        await pair.link()
        await pair.owner.freeze()
        reading = pair.start(list(range(300)), list(range(300)))
        await asyncio.sleep(0.3)
        assert not reading.done()
        await pair.reader.abort("link")
        await asyncio.wait([reading], timeout=BOUND_S)
        assert isinstance(reading.exception(), TransportError)
        await pair.reader.poison(0xEE)
        await pair.owner.thaw()
        await asyncio.sleep(0.3)
        assert (await pair.pool(pair.reader) == 0xEE).all()
        await asyncio.wait_for(pair.reader.close_link("link"), BOUND_S)


async def test_closing_is_clean_twice_over_and_the_processes_end_by_themselves(pair: Pair):
    await pair.link()
    await asyncio.wait_for(pair.start([1, 2, 3], [4, 5, 6]), BOUND_S)
    for peer in (pair.reader, pair.owner):
        await asyncio.wait_for(peer.close_link("link"), BOUND_S)
        await asyncio.wait_for(peer.close_link("link"), BOUND_S)
        await asyncio.wait_for(peer.close(), BOUND_S)
        await asyncio.wait_for(peer.close(), BOUND_S)
        assert await peer.leave() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="files are counted in /proc")
async def test_links_that_come_and_go_leave_nothing_open() -> None:
    """A worker that was stopped for a moment now and then had a connection more with each peer each time."""
    async with make_pair("nixl") as pair:
        await pair.link("first")
        peers = (pair.reader, pair.owner)
        nums = [await peer.num_sockets() for peer in peers]
        name = "first"
        for number in range(8):
            await pair.reader.close_link(name)
            name = f"later-{number}"
            await pair.link(name)
        async with asyncio.timeout(BOUND_S):  # the other end hears of the last one's end a little later
            while [await peer.num_sockets() for peer in peers] != nums:  # noqa: ASYNC110
                await asyncio.sleep(0.1)


async def test_dials_that_are_given_up_leave_nothing_open_and_both_processes_alive() -> None:
    """ucxx left a socket at both ends each time, and now and then ended the process."""
    async with make_pair("ucxx") as pair:
        await pair.link("before")
        descriptor, delays = await pair.owner.descriptor(), random.Random(3)
        peers = (pair.reader, pair.owner)
        nums = [await peer.num_sockets() for peer in peers]
        for _ in range(30):
            await pair.reader.give_up_connecting(descriptor, os.urandom(16), delays.uniform(0.0, 0.03))
        async with asyncio.timeout(60):  # those that were half made are forgotten after some seconds
            while any([await peer.num_sockets() > num for peer, num in zip(peers, nums, strict=True)]):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert await pair.link("after") == "tcp"


@pytest.mark.skipif(sys.platform != "linux", reason="a thread is held by ptrace, files are counted in /proc")
async def test_an_abort_while_ucx_hangs_holds_up_nobody_and_is_made_up_for() -> None:
    """The event loop waited eleven seconds for UCX's thread, and left the sockets open at both ends."""
    async with make_pair("ucxx") as pair:
        peers = (pair.reader, pair.owner)
        nums = [await peer.num_sockets() for peer in peers]
        await pair.link()
        with held(await asyncio.to_thread(ucx_thread, pair.reader.process.pid)):
            await asyncio.sleep(2.0)
            await asyncio.wait_for(pair.reader.abort("link"), 5.0)
        async with asyncio.timeout(BOUND_S):
            while [await peer.num_sockets() for peer in peers] != nums:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert await pair.link("after") == "tcp"
