"""Real decode workers die and drain at a given token, routers die in mid-stream: what clients get, and what is left."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import httpx
import pytest
from tandem.v1 import worker_pb2 as pb

from kvstore.index import IndexReader
from kvstore.registry import Membership
from kvstore.threads import OsThreads
from services.orders import GrpcOrders
from services.router.config import RouterConfig
from services.router.process import Seams, open_parts
from tests.completions import Client, about_equal
from tests.hf_models import random_prompts, reference_greedy
from tests.peers import AUTHORIZATION, PROOFS
from tests.router.direct import Answer, DirectClient
from tests.stack import Service, Stack
from tests.waiting import until

NUM_TOKENS = 64
NUM_DRAINED_TOKENS = 192  # so that the answer goes on for long enough to move
NUM_SPARES = 2
PATIENCE_S = 60.0  # nobody is left for its silence: that is tested elsewhere
WORKER = f"--num-gpu-blocks-override 256 --peer-timeout-s {PATIENCE_S} --stuck-after-s {PATIENCE_S}"
DECODE = "--local-prefill-max-tokens 16"
PROMPT = random_prompts([70], seed=21)[0]
LONG_S = 3600  # for what is long even on a machine that does nothing else
Combination = tuple[str, int, str, str]
Ending = Literal["kill", "terminate", "tell"]
COMBINATIONS = list(itertools.product(("greedy", "sampled"), (1, 3), ("", "logprobs"), ("", "stops")))
DEFAULT = [
    (("greedy", 1, "", ""), (1, 33, 63)),
    (("sampled", 3, "logprobs", "stops"), (2, 31, 40)),
]
DEFAULT_DRAINED: tuple[Combination, tuple[int, ...]] = (("greedy", 1, "", ""), (1, 31, 64))
ALL = [(each, range(1, 65) if each == COMBINATIONS[0] else (1, 2, 9, 26, 31, 32, 40, 63)) for each in COMBINATIONS]

pytestmark = pytest.mark.on_vllm(slow=True)


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path]) -> Iterator[Stack]:
    with new_stack(model_of("llama3"), WORKER, prefill=[""], decode=[DECODE] * (1 + NUM_SPARES)) as stack:
        yield stack


class DisturbingOrders(GrpcOrders):
    """Ends the worker that sends the frame with a certain token, before the router has it: kills or drains it."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(PROOFS.orders)
        self.end_at: int | None = None
        self.num_said = 0
        """Of the first sequence's tokens, when it happened: a frame may carry several."""
        self.told: list[Service] = []
        """Those that were told to drain and not to end."""
        self.ending: list[Service] = []
        """Those that were told to end."""
        self._how: Ending = "kill"
        self._stack = stack
        self._first: dict[str, int] = {}  # handles, by the worker's address
        self._num_tokens: dict[str, int] = {}
        self._processes = itertools.count(len(stack.services))

    def arm(self, end_at: int, how: Ending) -> None:
        """This happens to the next worker that sends so many tokens of a request's first sequence."""
        self.end_at, self._how = end_at, how
        self._first.clear()  # what it says still is not the next one's

    async def session(
        self, address: str, requests: AsyncIterator[pb.SessionRequest]
    ) -> AsyncGenerator[pb.SessionFrame, None]:
        async def watched() -> AsyncIterator[pb.SessionRequest]:
            async for request in requests:
                if request.HasField("generate") and request.generate.request_id in ("asked", "asked-0"):
                    self._first[address], self._num_tokens[address] = request.generate.handle, 0
                yield request

        is_dead = False
        async for frame in super().session(address, watched()):
            if is_dead:
                continue  # it was on its way
            first = self._first.get(address)
            said = sum(len(output.token_ids) for output in frame.outputs if output.handle == first)
            said += sum(handle == first for handle in frame.handles)
            self._num_tokens[address] = self._num_tokens.get(address, 0) + said
            if self.end_at is not None and said and self._num_tokens[address] >= self.end_at:
                self.end_at, self.num_said = None, self._num_tokens[address]
                await self._end(address)
                is_dead = self._how == "kill"
            yield frame

    async def _end(self, address: str) -> None:
        (record,) = (record for record in self._stack.records() if record.grpc_address == address)
        service = self._stack.services[record.worker_id]
        if self._how == "kill":
            service.process.kill()
            service.process.join()
        elif self._how == "terminate":
            self.ending.append(service)
            service.process.terminate()
        else:
            self.told.append(service)
            async with httpx.AsyncClient() as client:
                response = await client.post(f"http://{record.http_address}/drain", headers=AUTHORIZATION, timeout=60)
            assert response.status_code == 202
        # A spare for the next one.
        flags = service.argv[: service.argv.index("--worker-id")]
        self._stack.start(f"decode-{next(self._processes)}", "decode", flags)


def check_clean(stack: Stack) -> None:
    """Of the workers that live now; those that were started since have to say first where to ask them."""
    living = [each for each in stack.services.values() if each.role == "decode" and each.process.is_alive()]

    def are_known() -> bool:
        for record in stack.records():
            stack.services[record.worker_id].debug_url = f"http://{record.http_address}"
        return all(each.debug_url or not each.process.is_alive() for each in living)

    stack.wait_for(are_known, "the spares to serve")
    stack.check_clean()


@asynccontextmanager
async def router_of(stack: Stack, orders: GrpcOrders) -> AsyncIterator[DirectClient]:
    """A router in this process, over the stack's workers."""
    membership, index = Membership(stack.redis.url), IndexReader(stack.redis.url)
    await membership.start()
    await index.start()
    try:
        config = RouterConfig(redis=stack.redis.url, silence_timeout_s=PATIENCE_S)
        seams = Seams(orders, OsThreads(), time.monotonic, time.time)
        async with open_parts(config, membership, "router-in-test", seams, index) as parts:
            yield DirectClient(parts)
    finally:
        await index.close()
        await membership.close()


def body_of(num_tokens: int, sampling: str, n: int, logprobs: str, stop: str | None) -> dict[str, object]:
    """Without special tokens' ends: every sequence has so many tokens or ends by its stop string."""
    body: dict[str, object] = {"model": "m", "prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True}
    body |= {"n": n, "seed": 5, "temperature": 0 if sampling == "greedy" else 1, "stream": True, "stop": stop}
    return body | {"return_token_ids": True, "logprobs": 2 if logprobs else None, "receipt": True}


def late_part(text: str) -> str:
    """A string that the text first has near its end."""
    return next(text[i : i + 3] for i in range(len(text) - 9, 0, -1) if text.find(text[i : i + 3]) == i)


async def end_at_each(
    stack: Stack, combination: Combination, indices: Sequence[int], *hows: Ending
) -> AsyncIterator[tuple[int, Answer]]:
    """Ends the worker at each index in one of these ways, in turn; gives how many tokens it had said, where the answer
    had more, and what the client got, which is what it should be."""
    sampling, n, logprobs, has_stop = combination
    orders = DisturbingOrders(stack)
    async with router_of(stack, orders) as client:

        async def has_spares() -> None:
            await until(lambda: client.parts.workers.num_sessions_up == 1 + NUM_SPARES, LONG_S)
            await until(lambda: "m" in client.parts.models.names())

        await has_spares()
        length = NUM_TOKENS if hows == ("kill",) else NUM_DRAINED_TOKENS
        text = (await client.ask(**body_of(length, sampling, n, logprobs, None))).choices()[0]["text"]
        body = body_of(length, sampling, n, logprobs, late_part(str(text)) if has_stop else None)
        expected = await client.ask(**body)
        assert expected.error is None
        num_tokens = len(expected.choices()[0]["token_ids"])  # type: ignore[arg-type]
        for index, how in zip(indices, itertools.cycle(hows)):
            await has_spares()
            orders.arm(index, how)
            answer = await client.ask(**body)
            assert answer.error is None, answer.error
            assert about_equal(answer.choices(), expected.choices()), (combination, index, how)
            assert orders.end_at is None or index > num_tokens, f"nobody was ended at token {index}"
            while orders.told:
                orders.ending.append(orders.told.pop())
                orders.ending[-1].process.terminate()
            if orders.end_at is None and orders.num_said < num_tokens:
                yield orders.num_said, answer
        for service in orders.ending:
            await asyncio.to_thread(service.process.join)


def resumes_of(answer: Answer) -> list[dict[str, object]]:
    return [resume for receipt in answer.receipts for resume in receipt["resumes"]]  # type: ignore[attr-defined]


async def kill_at_each(stack: Stack, combination: Combination, indices: Sequence[int]) -> None:
    num_resumed = 0
    async for num_said, answer in end_at_each(stack, combination, indices, "kill"):
        assert num_said in [resume["carried_tokens"] for resume in resumes_of(answer)]
        num_resumed += 1
    assert num_resumed > len(indices) // 2, "others had said all in the frame that they died of, or stopped before"
    check_clean(stack)


@pytest.mark.parametrize(("combination", "indices"), DEFAULT)
async def test_a_decode_worker_killed_at_a_token_is_not_noticed(
    stack: Stack, combination: Combination, indices: Sequence[int]
) -> None:
    await kill_at_each(stack, combination, indices)


@pytest.mark.slow
@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize(("combination", "indices"), ALL)
async def test_a_decode_worker_killed_at_any_token_is_not_noticed(
    stack: Stack, combination: Combination, indices: Sequence[int]
) -> None:
    await kill_at_each(stack, combination, indices)


async def drain_at_each(stack: Stack, combination: Combination, indices: Sequence[int]) -> None:
    num_moved = 0
    async for _, answer in end_at_each(stack, combination, indices, "terminate", "tell"):
        for resume in resumes_of(answer):
            if resume["pause_seconds"] is None:
                continue  # its stop string was among the last tokens at the worker that it left
            assert (resume["reason"], resume["recomputed_tokens"]) == ("moved", 0)
            assert resume["moved_tokens"] == len(PROMPT) + resume["carried_tokens"]  # type: ignore[operator]
        num_moved += bool(resumes_of(answer))
    assert num_moved > len(indices) // 4, "others had ended before they could go"
    check_clean(stack)


async def test_a_decode_worker_drained_at_a_token_is_not_noticed_and_nothing_is_computed_again(stack: Stack) -> None:
    await drain_at_each(stack, *DEFAULT_DRAINED)


@pytest.mark.slow
@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize(("combination", "indices"), ALL)
async def test_a_decode_worker_drained_at_any_token_is_not_noticed_and_nothing_is_computed_again(
    stack: Stack, combination: Combination, indices: Sequence[int]
) -> None:
    await drain_at_each(stack, combination, indices)


def start_router(stack: Stack, name: str) -> tuple[Service, str]:
    """Another router, which is ready, and its URL."""
    router = stack.start(name, "router", stack.services["router"].argv)

    def urls() -> list[str]:
        return re.findall(r'listening on ([^\s"]+)', router.log)

    stack.wait_for(lambda: bool(urls()), f"{name} to listen")
    (url,) = urls()
    stack.wait_for(lambda: httpx.get(f"{url}/ready").status_code == 200, f"{name} to be ready")
    return router, url


async def test_a_killed_router_s_clients_see_the_end_and_everybody_else_goes_on(stack: Stack) -> None:
    prompts = random_prompts([40] * 4, seed=22)
    expected = reference_greedy(stack.model, prompts, 200, ignore_eos=True)
    second, url = start_router(stack, "router-1")
    begun = [asyncio.Event() for _ in prompts * 2]

    async def follow(client: Client, prompt: list[int], num_tokens: int, has_begun: asyncio.Event) -> list[int]:
        tokens: list[int] = []
        async with client.stream(prompt, max_tokens=num_tokens) as chunks:
            async for chunk in chunks:
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    tokens += choice["token_ids"]
                has_begun.set()
        return tokens

    async with Client(stack, 8) as client, Client(stack, 8, url) as doomed_client:
        twice = [prompt for prompt in prompts for _ in range(2)]
        # None of the doomed ones has ended when the last one begins.
        asked = zip((client, doomed_client) * 4, twice, (200, 1500) * 4, begun, strict=True)
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
