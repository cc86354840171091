"""A fleet that was idle for long serves the first request, whatever closed or forgotten its connections."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from tests.completions import Client
from tests.hf_models import random_prompts
from tests.ports import free_port
from tests.relay import FAR_HOST, Relays
from tests.stack import Stack

pytestmark = pytest.mark.timeout(600)
NUM_NEW_TOKENS = 12
NUM_AT_ONCE = 3


@dataclass
class Idle:
    """A stack behind relays, and prompts that nobody has sent yet."""

    stack: Stack
    relays: Relays
    ports: list[int]
    prompts: Iterator[list[int]]

    async def burst(self) -> list[str]:
        """Several new requests at once, asked once each; who prefilled them. Asked again they have the same answers."""
        prompts = list(itertools.islice(self.prompts, NUM_AT_ONCE))
        async with Client(self.stack, NUM_NEW_TOKENS) as client:
            answers = await asyncio.gather(*map(client.complete, prompts))
            again = await asyncio.gather(*map(client.complete, prompts))
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in again]
        return [str(answer.receipt["prefill_worker_id"]) for answer in answers]

    async def until_handed_over(self) -> None:
        """Until the prefill worker computes all of a burst's prompts."""
        while await self.burst() != ["prefill-0"] * NUM_AT_ONCE:
            pass


@pytest.fixture(scope="module")
def idle(new_stack: Callable[..., Stack], model_of: Callable[[str], Path]) -> Iterator[Idle]:
    ports = [free_port() for _ in range(4)]
    far = [f"--advertise-host {FAR_HOST} --port {grpc} --kv-port {kv}" for grpc, kv in (ports[:2], ports[2:])]
    prompts = (prompt for seed in itertools.count(41) for prompt in random_prompts([70] * 300, seed))
    worker = "--num-gpu-blocks-override 256 --peer-timeout-s 2"
    with Relays(ports) as relays:
        decode = f"{far[1]} --local-prefill-max-tokens 0"
        with new_stack(model_of("qwen3"), worker, prefill=[far[0]], decode=[decode]) as stack:
            yield Idle(stack, relays, ports, prompts)


async def test_the_first_request_after_redis_has_closed_all_connections_succeeds(idle: Idle) -> None:
    await idle.until_handed_over()
    with redis.Redis.from_url(idle.stack.redis.url) as client:
        assert client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    await idle.burst()
    await idle.until_handed_over()


async def test_the_first_request_after_a_firewall_forgot_all_connections_succeeds(idle: Idle) -> None:
    await idle.until_handed_over()
    idle.relays.forget(*idle.ports)
    await idle.burst()
    await idle.until_handed_over()
