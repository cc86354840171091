"""Two worker processes, a real transport, and what happens to processes: they freeze, and they are killed."""

import asyncio
import json
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
BOUND_S = 30.0


class Process:
    """An `exchange_peer` and its answers."""

    def __init__(self, transport: str, name: str) -> None:
        self.transport, self.name = transport, name
        self._answers: dict[str, asyncio.Future[Any]] = {}

    async def spawn(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.exchange.exchange_peer", self.transport, self.name),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=REPOSITORY,
        )
        self._reading = asyncio.ensure_future(self._read())
        self.address = await asyncio.wait_for(self._answer("address"), 2 * BOUND_S)

    def _answer(self, key: str) -> asyncio.Future[Any]:
        return self._answers.setdefault(key, asyncio.get_running_loop().create_future())

    async def _read(self) -> None:
        async for line in self.process.stdout:
            if line.startswith(b"> "):
                key, answer = json.loads(line[2:])
                self._answer(key).set_result(answer)

    def ask(self, key: str, order: str, *arguments: Any) -> "asyncio.Task[Any]":
        self.process.stdin.write(json.dumps([key, order, arguments]).encode() + b"\n")
        return asyncio.ensure_future(asyncio.wait_for(self._answer(key), BOUND_S))

    async def leave(self) -> int:
        """End it in the ordinary way, by force where that fails; return its exit status."""
        self.process.stdin.close()
        try:
            return await asyncio.wait_for(self.process.wait(), BOUND_S)
        finally:
            if self.process.returncode is None:
                self.process.kill()
                await self.process.wait()
            await self._reading


@asynccontextmanager
async def owner_and_reader(transport: str) -> AsyncIterator[tuple[Process, Process]]:
    owner, reader = Process(transport, "prefill-0"), Process(transport, "decode-0")
    await asyncio.gather(owner.spawn(), reader.spawn())
    try:
        yield owner, reader
    finally:
        await asyncio.gather(owner.leave(), reader.leave())


async def transfer(
    owner: Process, reader: Process, key: str, num_blocks: int, hang: bool = False, into: range = range(256)
) -> "tuple[asyncio.Task[Any], asyncio.Task[Any]]":
    """Order a transfer of random blocks into random blocks out of `into`."""
    rng = random.Random(key)
    sources, targets = rng.sample(range(256), num_blocks), rng.sample(into, num_blocks)
    await reader.ask(f"{key} ordered", "order", key, "prefill-0", targets)
    fetching = reader.ask(key, "outcome", key, "prefill-0", targets, sources)
    leasing = owner.ask(key, "lease", key, "decode-0", sources, hang)
    return fetching, leasing


LANES = {"ucxx": ["prefill-0", "ucxx", "tcp"], "nixl": ["prefill-0", "nixl", "cma"]}


@pytest.mark.parametrize("transport", ["ucxx", "nixl"])
async def test_transfers_come_through_a_frozen_readers_lease_expires_and_it_starts_afresh(transport: str):
    async with owner_and_reader(transport) as (owner, reader):
        assert await reader.ask("connect", "connect", owner.address) == LANES[transport]
        pools = {2: range(10), 100: range(10, 150), 37: range(150, 256)}  # at once, so not into the same blocks
        several = [await transfer(owner, reader, f"t{n}", n, into=pool) for n, pool in pools.items()]
        for fetching, leasing in several:
            assert await fetching == ["ok", True, 0]
            assert await leasing == "confirmed"

        fetching, leasing = await transfer(owner, reader, "frozen", 20, hang=True)
        await reader.ask("reads", "until_reading")
        reader.process.send_signal(signal.SIGSTOP)
        assert await leasing == "expired"
        await asyncio.sleep(2.0)  # until the owner has given the reader up altogether
        reader.process.send_signal(signal.SIGCONT)
        cause, _, num_returned = await fetching
        assert cause in ("revoked", "peer_lost")
        assert num_returned == 20

        assert await reader.ask("again", "connect", owner.address) == LANES[transport]
        fetching, leasing = await transfer(owner, reader, "afresh", 50)
        assert await fetching == ["ok", True, 0]
        assert await leasing == "confirmed"
        assert [await owner.leave(), await reader.leave()] == [0, 0]


@pytest.mark.parametrize("transport", ["ucxx", "nixl"])
async def test_an_owner_killed_in_mid_transfer_fails_the_fetch_and_the_reader_gets_its_blocks_back(transport: str):
    async with owner_and_reader(transport) as (owner, reader):
        await reader.ask("connect", "connect", owner.address)
        fetching, leasing = await transfer(owner, reader, "killed", 200, hang=True)
        await reader.ask("reads", "until_reading")
        owner.process.kill()
        cause, _, num_returned = await fetching
        assert cause in ("peer_lost", "read_failed")
        assert num_returned == 200
        assert (await reader.ask("again", "connect", owner.address)).startswith("PeerUnreachable")
        leasing.cancel()
        assert await reader.leave() == 0
