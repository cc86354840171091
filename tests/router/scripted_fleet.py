"""A router in the test's own loop, over decode workers whose every token depends on all that they should have seen.

Orders go through memory (`tests.memory_orders`), requests straight to the endpoint: only the router's own code runs,
and thousands of requests take seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from tandem.v1 import worker_pb2 as pb

from kvstore.registry import WorkerRecord
from kvstore.threads import OsThreads
from services.orders import RESUMES, StreamBroken
from services.router.config import RouterConfig
from services.router.edge import RouterParts
from services.router.process import Seams, open_parts
from tests.memory_orders import MemoryOrders, MemoryServer
from tests.router.direct import DirectClient
from tests.router.fake_worker import position
from tests.router.harness import FakeIndex, FakeMembership
from tests.waiting import until
from tests.worker_records import worker_record

FIRST_TOKEN, NUM_TOKENS = 5, 390  # of the tiny model's vocabulary, without special tokens
_NUM_FIRST_WORDS, _NUM_LAST_WORDS = 4, 3  # by the first ones, all choices of a request have come
_numbers = itertools.count(1)


class Killed(Exception):
    """The worker is gone."""


@dataclass(eq=False)
class ScriptedWorker:
    """A decode worker in which a token follows from seed, prompt and all tokens before it."""

    model_path: str
    num_outstanding: int = 0
    features: tuple[str, ...] = (RESUMES,)
    dies_after: int | None = None
    """Tokens of its first order; the frame that carries the last of them is sent, and nobody is there any more."""
    dies_once: asyncio.Event | None = None
    """What it waits for before that."""
    breaks_after: int | None = None
    """Tokens of any order; then the session breaks, and the worker lives on."""
    hangs_after: int | None = None
    """The same as `dies_after`; then it says that its step loop stands still."""
    is_dead: bool = False
    gives_up_after: int | None = None
    """The same; then every order gets a word that the worker is shutting down."""
    silent_after: int | None = None
    """The same; then this session is served no more, and stays up."""
    is_full: bool = False
    """It refuses all orders."""
    drains: bool = False
    drains_after: int | None = None
    """The same; then it says that it drains, and lets go whom it is told to."""
    is_brief: bool = False
    """What is far from its end, and from the first words of its first order, it says in one frame."""
    num_free_blocks: int = 1000
    max_model_len: int = 512
    context: int | None = None
    """What it really holds; None: as its record says."""
    numerics: str = "alike"
    is_exact: bool = True
    num_cached: int = 3
    """Tokens of each prompt that it says it has found in a cache."""
    prefilled_by: str = ""
    """The worker that computes its prompts; empty: it does."""
    max_moving: int = 0
    """The most orders that it was told to let go and has not, in one step."""
    refuses: bool = False
    """It drains: every order gets a word of that."""
    differs: bool = False
    """Its tokens are not those of the others."""
    role: str = "decode"
    budgets: pb.Budgets | None = None
    """That it says it has."""
    num_running: int = 0
    """Streams of others."""
    num_context_tokens: int = 0
    num_waiting_tokens: int = 0
    orders: list[pb.GenerateRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        number = next(_numbers)
        self.record = worker_record(
            worker_id=f"scripted-{number}",
            incarnation=f"{number:024x}",
            role=self.role,
            served_model_names=("tiny",),
            model_path=self.model_path,
            tokenizer_path=self.model_path,
            grpc_address=f"scripted-{number}",
            max_model_len=self.max_model_len,
            colocated=self.role == "decode",
            numerics=self.numerics,
            is_exact=self.is_exact,
            transports=("memory",),
        )

    async def serve(
        self, requests: AsyncIterator[pb.SessionRequest], send: Callable[[pb.SessionFrame], Awaitable[None]]
    ) -> None:
        if self.is_dead:
            raise Killed
        live: dict[int, _Output] = {}
        has_work = asyncio.Event()
        load = pb.Load(
            num_running=self.num_outstanding or self.num_running,
            num_free_blocks=self.num_free_blocks,
            draining=self.drains,
        )
        load.num_blocks = 1000
        load.num_context_tokens, load.num_waiting_tokens = self.num_context_tokens, self.num_waiting_tokens
        if self.budgets is not None:
            load.budgets.CopyFrom(self.budgets)
        first = pb.SessionFrame(load=load, incarnation=self.record.incarnation, features=self.features)
        first.heartbeat_s = float(self.silent_after is not None)
        await send(first)
        reading = asyncio.create_task(self._read(requests, live, has_work))
        try:
            while True:
                await has_work.wait()
                if not live:
                    has_work.clear()
                    continue
                frame, num_said = pb.SessionFrame(load=load), 0
                if self.refuses:
                    frame.load.draining = True
                    _refuse(frame, live, list(live), pb.ERROR_CODE_UNAVAILABLE, "draining")
                num_at_once = self._num_at_once(live)
                for handle, output in list(live.items()):
                    if output.order is self.orders[0]:
                        num_said = output.num_said + num_at_once
                    if self.is_full:
                        _refuse(frame, live, [handle], pb.ERROR_CODE_OVERLOADED, "full")
                    elif output.is_too_long:
                        _refuse(frame, live, [handle], pb.ERROR_CODE_INVALID, "too long")
                    elif output.is_leaving:
                        self._let_go(output, frame)
                        del live[handle]
                    elif any(output.say(frame) for _ in range(num_at_once)):
                        del live[handle]
                load.draining = self.drains = self.drains or num_said == self.drains_after
                await send(frame)
                await asyncio.sleep(0)  # orders and aborts come in between two steps
                await self._befall(num_said, live, send)
        finally:
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading

    async def _befall(
        self, num_said: int, live: dict[int, _Output], send: Callable[[pb.SessionFrame], Awaitable[None]]
    ) -> None:
        """What is to happen once so many tokens of its first order have been sent."""
        if num_said == self.dies_after:
            if self.dies_once is not None:
                await self.dies_once.wait()
            self.is_dead = True
            raise Killed
        if any(output.num_said == self.breaks_after for output in live.values()):
            raise StreamBroken("ping timeout")
        if num_said == self.hangs_after:
            await send(pb.SessionFrame(stuck="step loop"))
            self.is_dead = True
            await asyncio.Event().wait()
        if num_said == self.silent_after:
            await asyncio.Event().wait()
        if num_said == self.gives_up_after:
            frame = pb.SessionFrame(load=pb.Load(draining=True))
            _refuse(frame, live, list(live), pb.ERROR_CODE_UNAVAILABLE, "shutting down")
            await send(frame)

    def _num_at_once(self, live: dict[int, _Output]) -> int:
        first = next((output for output in live.values() if output.order is self.orders[0]), None)
        if not self.is_brief or first is None or first.num_said < _NUM_FIRST_WORDS:
            return 1
        end = self.dies_after or self.drains_after
        return max((end - _NUM_LAST_WORDS if end else sys.maxsize) - first.num_said, 1)

    async def _read(
        self, requests: AsyncIterator[pb.SessionRequest], live: dict[int, _Output], has_work: asyncio.Event
    ) -> None:
        async for message in requests:
            if message.HasField("generate"):
                self.orders.append(message.generate)
                context = self.context or self.max_model_len
                live[message.generate.handle] = _Output(message.generate, self, context)
                has_work.set()
            elif message.HasField("abort"):
                live.pop(message.abort.handle, None)
            elif message.HasField("move") and message.move.handle in live:
                live[message.move.handle].is_leaving = True
                self.max_moving = max(self.max_moving, sum(output.is_leaving for output in live.values()))

    def _let_go(self, output: _Output, frame: pb.SessionFrame) -> None:
        last = frame.outputs.add(handle=output.order.handle, finish_reason=pb.FINISH_REASON_MOVED)
        last.move.worker_id, last.move.incarnation = self.record.worker_id, self.record.incarnation
        last.move.transfer_id = len(self.orders).to_bytes(16)
        last.move.num_tokens = len(output.order.prompt_token_ids) + output.num_before + output.num_said - 1


def _refuse(
    frame: pb.SessionFrame, live: dict[int, _Output], handles: Sequence[int], code: pb.ErrorCode, message: str
) -> None:
    """Have the frame end these with an error."""
    for handle in handles:
        frame.outputs.add(
            handle=handle, finish_reason=pb.FINISH_REASON_ERROR, error=pb.Error(code=code, message=message)
        )
        del live[handle]


class _Output:
    """An order's output: a hash of what came before is the next token."""

    def __init__(self, order: pb.GenerateRequest, worker: ScriptedWorker, context: int) -> None:
        self.order = order
        self._room = context - len(order.prompt_token_ids)
        self._worker = worker
        self.num_said = 0
        self.is_leaving = False
        self.num_before = len(order.resumed_token_ids)
        self._state = zlib.crc32(repr(list(order.prompt_token_ids)).encode(), int(worker.differs))
        for token_id in order.resumed_token_ids:
            self._add(token_id)

    @property
    def is_too_long(self) -> bool:
        return self.num_said == 0 and self.num_before >= self._room

    def _add(self, token_id: int) -> None:
        self._state = zlib.crc32(token_id.to_bytes(4), self._state)

    def say(self, frame: pb.SessionFrame) -> bool:
        """Add the next token to the frame; whether it was the last."""
        order, sampling = self.order, self.order.sampling
        seed = sampling.seed if sampling.temperature > 0 else 0
        token_id = FIRST_TOKEN + zlib.crc32(seed.to_bytes(8), self._state) % NUM_TOKENS
        self._add(token_id)
        self.num_said += 1
        is_last = self.num_before + self.num_said == min(sampling.max_tokens, self._room)
        has_logprobs = sampling.HasField("logprobs")
        if self.num_said > 1 and not is_last and not has_logprobs:
            frame.handles.append(order.handle)
            frame.token_ids.append(token_id)
            return False
        output = frame.outputs.add(handle=order.handle, token_ids=[token_id])
        if has_logprobs:
            output.logprobs.append(position(token_id, sampling.logprobs))
        num_tokens = len(order.prompt_token_ids) + self.num_before
        if self.num_said == 1 or is_last:
            output.usage.CopyFrom(pb.Usage(num_prompt_tokens=num_tokens, num_cached_tokens=self._worker.num_cached))
            output.usage.prefilled_locally = not self._worker.prefilled_by
            output.usage.prefill_worker_id = self._worker.prefilled_by
            if order.HasField("move"):
                output.usage.num_cached_tokens, output.usage.prefilled_locally = num_tokens, False
                output.usage.ClearField("prefill_worker_id")
                output.usage.moved.CopyFrom(pb.FetchedPrefix(holder_id=order.move.worker_id, num_blocks=2))
        if is_last:
            output.finish_reason = pb.FINISH_REASON_LENGTH
        return is_last


class ScriptedFleet(DirectClient):
    """The router and who serves at the moment."""

    def __init__(self, parts: RouterParts, membership: FakeMembership, orders: MemoryOrders) -> None:
        super().__init__(parts)
        self._membership = membership
        self._orders = orders

    async def serve_with(self, *workers: ScriptedWorker) -> None:
        """These are the workers from now on; returns when the router has reached all."""
        self.announce(*workers)
        await until(lambda: self.parts.workers.num_sessions_up == len(workers) and "tiny" in self.parts.models.names())

    def announce(self, *workers: ScriptedWorker, holds: tuple[WorkerRecord, ...] = ()) -> None:
        """The same, without waiting; `holds` are others, who hold blocks."""
        self._orders.servers.clear()
        for worker in workers:
            server = self._orders.servers[worker.record.grpc_address] = MemoryServer()
            server.serve_sessions(worker.serve)
        self._membership.set(*(worker.record for worker in workers), *holds)


@asynccontextmanager
async def scripted_fleet(
    config: RouterConfig | None = None, index: FakeIndex | None = None
) -> AsyncIterator[ScriptedFleet]:
    membership, orders = FakeMembership(), MemoryOrders()
    config, seams = config or RouterConfig(), Seams(orders, OsThreads(), time.monotonic, time.time)
    async with open_parts(config, membership, "router", seams, index) as parts:  # type: ignore[arg-type]
        yield ScriptedFleet(parts, membership, orders)
        membership.set()
