"""The simulated loop, threads and network do what the real ones do, and only that."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from kvstore.errors import PeerLost
from kvstore.exchange.framing import FrameStream
from kvstore.protocol import Ready, Reject
from tests.simulation.loop import SimLoop, Stuck
from tests.simulation.net import SimNet
from tests.simulation.threads import SimThreads


def test_time_passes_without_waiting_and_timers_fire_in_order():
    loop, seen = SimLoop(1), []

    async def sleeper(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        seen.append((delay_s, loop.time()))

    async def main() -> None:
        await asyncio.gather(*(sleeper(delay_s) for delay_s in (3600.0, 1.0, 60.0)))

    loop.run(main(), 10_000.0)
    assert seen == [(1.0, 1.0), (60.0, 60.0), (3600.0, 3600.0)]


def test_a_wait_that_nothing_can_end_is_named():
    loop = SimLoop(1)

    async def waits_in_vain() -> None:
        await loop.create_future()

    with pytest.raises(Stuck, match=r"deadlock.*waits_in_vain"):
        loop.run(waits_in_vain(), 10.0)
    loop.finish()


def test_a_task_that_spins_is_named():
    loop = SimLoop(1)

    async def spins() -> None:
        while True:  # noqa: ASYNC110 -- that is the point
            await asyncio.sleep(0)

    with pytest.raises(Stuck, match=r"spins"):
        loop.run(spins(), 10.0)
    loop.finish()


@pytest.mark.parametrize("shuffles", [True, False])
def test_the_order_of_ready_callbacks_is_the_seeds(shuffles: bool):
    def order_of(seed: int) -> tuple[list[int], str]:
        loop, order = SimLoop(seed, shuffles), []

        async def main() -> None:
            for number in range(8):
                loop.call_soon(order.append, number)
            await asyncio.sleep(1.0)

        loop.run(main(), 10.0)
        return order, loop.trace

    assert order_of(1) == order_of(1)
    assert (len({tuple(order_of(seed)[0]) for seed in range(5)}) > 1) == shuffles
    if not shuffles:
        assert order_of(1)[0] == list(range(8))


def test_a_paused_process_catches_up_and_a_killed_one_never_does():
    loop, seen = SimLoop(1), []
    paused, killed = loop.new_process("paused"), loop.new_process("killed")

    async def beat(name: str) -> None:
        for _ in range(3):
            await asyncio.sleep(1.0)
            seen.append((name, loop.time()))

    async def main() -> None:
        for process in (paused, killed):
            with loop.within(process):
                loop.create_task(beat(process.name))
        await asyncio.sleep(1.5)
        loop.pause(paused)
        loop.kill(killed)
        await asyncio.sleep(3.0)
        loop.resume(paused)
        await asyncio.sleep(2.0)

    loop.run(main(), 10.0)
    assert sorted(seen) == [("killed", 1.0), ("paused", 1.0), ("paused", 4.5), ("paused", 5.5)]
    loop.finish()


def test_jobs_take_time_and_no_thread():
    loop = SimLoop(1)
    threads, me = SimThreads(loop, max_delay_s=1.0), threading.get_ident()

    async def main() -> None:
        pool = threads.pool("work", 1)
        assert await asyncio.gather(*(loop.run_in_executor(pool, threading.get_ident) for _ in range(3))) == [me] * 3
        assert await threads.run(threading.get_ident) == me
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(pool, lambda: 1 // 0)
        assert 0 < loop.time() < 5.0
        left = loop.run_in_executor(pool, lambda: "done")
        pool.shutdown(wait=True)
        assert left.result() == "done"

    loop.run(main(), 10.0)


def talk(
    client: Callable[[FrameStream], Awaitable[None]],
    server: Callable[[FrameStream], Awaitable[None]],
    change: Callable[[SimNet], None] = lambda net: None,
) -> SimNet:
    """Run both ends of one connection."""
    loop = SimLoop(1)
    net = SimNet(loop)
    change(net)

    async def main() -> None:
        served = loop.create_future()

        async def accept(stream: FrameStream) -> None:
            await server(stream)
            await stream.close(flush_s=1.0)
            served.set_result(None)

        with loop.within(process := loop.new_process("server")):
            listener = await net.of("s", process).listen("s", 7000, accept)
        stream = await net.of("c", loop.new_process("client")).dial("s", 7000)
        await client(stream)
        await stream.close(flush_s=1.0)
        await served
        listener.close()
        with pytest.raises(ConnectionRefusedError):
            await net.of("c", loop.world).dial("s", 7000)

    loop.run(main(), 60.0)
    assert loop.errors == []
    loop.finish()
    return net


async def say_three(stream: FrameStream) -> None:
    for number in range(3):
        stream.send(Reject(str(number)))


def test_messages_arrive_whole_and_in_order_however_the_bytes_are_split():
    heard = []

    async def hear(stream: FrameStream) -> None:
        heard.extend([(await stream.receive()).reason for _ in range(3)])
        with pytest.raises(PeerLost, match="closed the connection"):
            await stream.receive()

    def split(net: SimNet) -> None:
        net.weather.split, net.weather.max_latency_s = 1.0, 1.0

    talk(say_three, hear, split)
    assert heard == ["0", "1", "2"]


def test_a_connection_can_be_cut_at_any_byte():
    num_heard, num_cut = set(), 0

    async def say(stream: FrameStream) -> None:
        await say_three(stream)
        await asyncio.sleep(1.0)

    async def hear(stream: FrameStream) -> None:
        for number in range(4):
            try:
                await stream.receive()
            except PeerLost:
                num_heard.add(number)
                return

    for seed in range(20):

        def cut(net: SimNet, seed: int = seed) -> None:
            net.weather.cut, net.weather.max_cut_bytes = 1.0, 100
            net.loop.random.seed(seed)

        num_cut += talk(say, hear, cut).faults["cut"]
    assert num_heard == {0, 1, 2, 3}
    assert num_cut > 10


def test_a_partition_delays_and_a_host_that_has_vanished_answers_nothing():
    loop = SimLoop(1)
    net, heard = SimNet(loop), []

    async def accept(stream: FrameStream) -> None:
        while True:
            await stream.receive()
            heard.append(loop.time())

    async def main() -> None:
        server = loop.new_process("server")
        with loop.within(server):
            await net.of("s", server).listen("s", 7000, accept)
        stream = await net.of("c", loop.world).dial("s", 7000)
        net.part("c", "s")
        stream.send(Ready())
        await asyncio.sleep(20.0)
        assert heard == []
        net.join("c", "s")
        await asyncio.sleep(1.0)
        assert len(heard) == 1
        loop.kill(server)
        net.kill("s", silently=True)
        stream.send(Ready())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60.0):
                await stream.receive()  # half open: no end, no error
        net.back("s")
        with pytest.raises(PeerLost):
            await stream.receive()

    loop.run(main(), 200.0)
    loop.finish()
