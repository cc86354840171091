"""Real decode workers are killed at a given token, and routers in mid-stream: what clients get, and what is left."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from math import isclose
from pathlib import Path

import httpx
import pytest
from tandem.v1 import worker_pb2 as pb

from kvstore.index import IndexReader
from kvstore.registry import Membership
from kvstore.threads import OsThreads
from services.orders import GrpcOrders
from services.router.config import RouterConfig
from services.router.process import open_parts
from tests.completions import Client
from tests.hf_models import random_prompts, reference_greedy
from tests.peers import PROOFS
from tests.router.direct import Answer, DirectClient
from tests.stack import Service, Stack
from tests.waiting import until

NUM_TOKENS = 64
NUM_SPARES = 2
WORKER = "--num-gpu-blocks-override 256 --lease-s 2"
DECODE = "--local-prefill-max-tokens 16"
PROMPT = random_prompts([70], seed=21)[0]
COMBINATIONS = list(itertools.product(("greedy", "sampled"), (1, 3), ("", "logprobs"), ("", "stops")))
DEFAULT = [
    (("greedy", 1, "", ""), (1, 33, 63)),
    (("sampled", 3, "logprobs", "stops"), (2, 31, 40)),
]
ALL = [(each, range(1, 65) if each == COMBINATIONS[0] else (1, 2, 9, 26, 31, 32, 40, 63)) for each in COMBINATIONS]


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path]) -> Iterator[Stack]:
    with new_stack(model_of("llama3"), WORKER, prefill=[""], decode=[DECODE] * (1 + NUM_SPARES)) as stack:
        yield stack


class KillingOrders(GrpcOrders):
    """Kills the worker that sends the frame with a certain token, before the router has it."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(PROOFS.orders)
        self.kill_at: int | None = None
        self._stack = stack
        self._num_tokens: dict[str, int] = {}
        self._processes = itertools.count(len(stack.services))

    def arm(self, kill_at: int | None) -> None:
        """The next worker to send so many tokens of a request's first sequence dies of it."""
        self.kill_at = kill_at
        self._num_tokens.clear()

    async def session(
        self, address: str, requests: AsyncIterator[pb.SessionRequest]
    ) -> AsyncGenerator[pb.SessionFrame, None]:
        first: list[int] = []

        async def watched() -> AsyncIterator[pb.SessionRequest]:
            async for request in requests:
                if request.HasField("generate") and request.generate.request_id in ("asked", "asked-0"):
                    first[:] = [request.generate.handle]
                    self._num_tokens[address] = 0
                yield request

        async for frame in super().session(address, watched()):
            said = sum(len(output.token_ids) for output in frame.outputs if output.handle in first)
            said += sum(handle in first for handle in frame.handles)
            self._num_tokens[address] = self._num_tokens.get(address, 0) + said
            if self.kill_at is not None and said and self._num_tokens[address] >= self.kill_at:
                self.kill_at = None
                self._kill(address)
            yield frame

    def _kill(self, address: str) -> None:
        (name,) = (record.worker_id for record in self._stack.records() if record.grpc_address == address)
        self._stack.services[name].process.kill()
        self._stack.services[name].process.join()
        flags = self._stack.services[name].argv
        # A spare for the next one.
        self._stack.start(f"decode-{next(self._processes)}", "decode", flags[: flags.index("--worker-id")])


def check_clean(stack: Stack) -> None:
    """Of the workers that live now; those that were started since have to say first where to ask them."""
    living = {each.name for each in stack.services.values() if each.role == "decode" and each.process.is_alive()}
    stack.wait_for(lambda: living <= {record.worker_id for record in stack.records()}, "the spares to serve")
    for record in stack.records():
        stack.services[record.worker_id].debug_url = f"http://{record.http_address}"
    stack.check_clean()


@asynccontextmanager
async def router_of(stack: Stack, orders: GrpcOrders) -> AsyncIterator[DirectClient]:
    """A router in this process, over the stack's workers."""
    membership, index = Membership(stack.redis.url), IndexReader(stack.redis.url)
    await membership.start()
    await index.start()
    try:
        config = RouterConfig(redis=stack.redis.url)
        async with open_parts(config, membership, "router-in-test", orders, OsThreads(), index) as parts:
            yield DirectClient(parts)
    finally:
        await index.close()
        await membership.close()


def about_equal(found: object, expected: object) -> bool:
    """Log probabilities may differ in their last bits, as the same tokens computed in other chunks do."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(about_equal(found[key], expected[key]) for key in found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(about_equal, found, expected))
    if isinstance(found, float) and isinstance(expected, float):
        return isclose(found, expected, rel_tol=1e-3, abs_tol=1e-4)
    return found == expected


def body_of(sampling: str, n: int, logprobs: str, stop: str | None) -> dict[str, object]:
    """Without special tokens' ends: every sequence has 64 tokens or ends by its stop string."""
    body: dict[str, object] = {"model": "m", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    body |= {"n": n, "seed": 5, "temperature": 0 if sampling == "greedy" else 1, "stream": True, "stop": stop}
    return body | {"return_token_ids": True, "logprobs": 2 if logprobs else None, "receipt": True}


async def kill_at_each(stack: Stack, combination: tuple[str, int, str, str], indices: tuple[int, ...] | range) -> None:
    sampling, n, logprobs, has_stop = combination
    orders = KillingOrders(stack)
    async with router_of(stack, orders) as client:

        async def has_spares() -> None:
            await until(lambda: client.parts.workers.num_sessions_up == 1 + NUM_SPARES)
            await until(lambda: "m" in client.parts.models.names())

        await has_spares()
        text = (await client.ask(**body_of(sampling, n, logprobs, None))).choices()[0]["text"]
        body = body_of(sampling, n, logprobs, str(text)[-12:-9] if has_stop else None)
        expected = await client.ask(**body)
        assert expected.error is None
        for index in indices:
            await has_spares()
            orders.arm(index)
            answer: Answer = await client.ask(**body)
            assert answer.error is None, answer.error
            assert about_equal(answer.choices(), expected.choices()), (combination, index)
            if orders.kill_at is None and index < len(expected.choices()[0]["token_ids"]):  # type: ignore[arg-type]
                carried = [resume["carried_tokens"] for each in answer.receipts for resume in each["resumes"]]  # type: ignore[attr-defined]
                assert max(carried) >= index  # the frame may carry the next one, too


@pytest.mark.parametrize(("combination", "indices"), DEFAULT)
async def test_a_decode_worker_killed_at_a_token_is_not_noticed(
    stack: Stack, combination: tuple[str, int, str, str], indices: tuple[int, ...]
) -> None:
    await kill_at_each(stack, combination, indices)
    check_clean(stack)


@pytest.mark.slow
@pytest.mark.parametrize(("combination", "indices"), ALL)
async def test_a_decode_worker_killed_at_any_token_is_not_noticed(
    stack: Stack, combination: tuple[str, int, str, str], indices: tuple[int, ...] | range
) -> None:
    await kill_at_each(stack, combination, indices)
    check_clean(stack)


def start_router(stack: Stack, name: str) -> tuple[Service, str]:
    """Another router, which is ready, and its URL."""
    router = stack.start(name, "router", stack.services["router"].argv)

    def urls() -> list[str]:
        return re.findall(r'listening on ([^\s"]+)', router.log) if router.log_path.exists() else []

    stack.wait_for(lambda: bool(urls()), f"{name} to listen")
    (url,) = urls()
    stack.wait_for(lambda: httpx.get(f"{url}/ready").status_code == 200, f"{name} to be ready")
    return router, url


async def test_a_killed_router_s_clients_see_the_end_and_everybody_else_goes_on(stack: Stack) -> None:
    prompts = random_prompts([40] * 4, seed=22)
    expected = reference_greedy(stack.model, prompts, 200, ignore_eos=True)
    second, url = start_router(stack, "router-1")
    begun = [asyncio.Event() for _ in prompts * 2]

    async def follow(client: Client, prompt: list[int], has_begun: asyncio.Event) -> list[int]:
        tokens: list[int] = []
        async with client.stream(prompt, max_tokens=200) as chunks:
            async for chunk in chunks:
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    tokens += choice["token_ids"]
                has_begun.set()
        return tokens

    async with Client(stack, 8) as client, Client(stack, 8, url) as doomed_client:
        asked = zip((client, doomed_client) * 4, [prompt for prompt in prompts for _ in range(2)], begun, strict=True)
        streams = [asyncio.create_task(follow(*each)) for each in asked]
        await asyncio.gather(*(event.wait() for event in begun))
        second.process.kill()
        ends = await asyncio.gather(*streams, return_exceptions=True)
        assert ends[::2] == expected
        assert all(isinstance(end, httpx.TransportError) for end in ends[1::2]), ends[1::2]
        check_clean(stack)
        assert (await client.complete(prompts[0])).tokens == expected[0][:8]
    _, url = start_router(stack, "router-2")
    async with Client(stack, 8, url) as back:
        assert (await back.complete(prompts[1])).tokens == expected[1][:8]
