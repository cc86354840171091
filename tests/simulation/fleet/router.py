"""A router without its HTTP: the product's dispatch, placement, sessions, admission. Its clients check each token."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from tandem.v1 import worker_pb2 as pb

from kvstore.index import IndexObserver, IndexReader
from kvstore.index.session import LookupOutcome
from kvstore.registry import Membership
from services.router.admission import Admission, Room
from services.router.errors import ApiError
from services.router.fleet import Ask, Budget, Dispatch, Placer, PrefixFinder, Workers, routing_key
from services.router.metrics import RouterMetrics
from services.router.routing import DecisionLog, Policy
from tests.simulation.fleet.computation import FINGERPRINT, VOCAB_SIZE, expected_tokens
from tests.simulation.fleet.orders import SimOrders
from tests.simulation.fleet.redis_host import REDIS_URL
from tests.simulation.fleet.worker import MODEL
from tests.simulation.pool import Invariant

if TYPE_CHECKING:
    from tests.simulation.fleet.world import FleetWorld

REQUEST_TIMEOUT_S: Final = 40.0
_BUDGET: Final = Budget(max_attempts=4, max_worker_deaths=3, resume_wait_s=15)


class _Lookups(IndexObserver):
    """Notes how lookups end."""

    def __init__(self, world: FleetWorld) -> None:
        self._world = world

    def lookup_ended(self, outcome: LookupOutcome, num_blocks: int, num_held: int, duration_s: float) -> None:
        self._world.reach(f"lookup {outcome.value}{', found' if num_held else ''}")


class SimRouter:
    """One router, and the clients that speak to it."""

    def __init__(self, world: FleetWorld) -> None:
        self.name = "r"
        self._world = world
        self.process = world.loop.new_process("r/1")
        self.num_live = 0
        with world.loop.within(self.process):
            self.metrics = RouterMetrics()
            self.membership = Membership(REDIS_URL)
            orders = SimOrders(world.orders, self.name, self.process)
            self.workers = Workers(self.membership, self.name, orders, reconnect_max_s=1.0)
            self.index = IndexReader(REDIS_URL, observer=_Lookups(world))
            self._placer = Placer(self.workers, Policy.KV, DecisionLog(100))
            self._finder = PrefixFinder(self.index, self.metrics, 1.0)
            self._admission = Admission(64, 64, clock=world.loop.time)

    async def start(self) -> None:
        await self.membership.start()
        await self.index.start()
        self.workers.start()

    async def request(self, number: str, draw: random.Random, leaves_after: int | None = None) -> str:
        """Serve one client, who leaves after so many tokens if it says so; how it ended."""
        prompt, num_tokens = draw_prompt(draw), draw.randrange(1, 14)
        sampling = pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=num_tokens, ignore_eos=True)
        order = pb.GenerateRequest(
            request_id=number, model=MODEL, prompt_token_ids=prompt, sampling=sampling, timeout_s=REQUEST_TIMEOUT_S
        )
        spaces = self._placer.spaces(MODEL, {FINGERPRINT})
        (blocks,) = await self._finder.find([prompt], "", spaces)
        ask = Ask("", number, 0, order, {FINGERPRINT}, blocks, routing_key(prompt, ""))
        self.num_live += 1
        try:
            with self._admission.admit(1) as room:
                return await self._stream(ask, room, expected_tokens(prompt, num_tokens), leaves_after)
        except ApiError as error:
            return f"refused: {error.message}"
        finally:
            self.num_live -= 1

    async def _stream(self, ask: Ask, room: Room, expected: list[int], leaves_after: int | None) -> str:
        dispatch = Dispatch(
            self.workers,
            self._placer,
            self._finder,
            self.metrics,
            room,
            lambda _: ask,
            _BUDGET,
        )
        tokens: list[int] = []
        try:
            while leaves_after is None or len(tokens) < leaves_after:
                for arrival in await dispatch.arrivals():
                    tokens += arrival.token_ids
                    self._world.judge(Invariant.RIGHT_TOKENS)
                    if tokens != expected[: len(tokens)]:
                        what = f"request {ask.request_id} got {tokens}, and not {expected}"
                        self._world.report(Invariant.RIGHT_TOKENS, what)
                    if arrival.output is not None and arrival.output.finish_reason:
                        served_by = dispatch.served_by(0)
                        if served_by is not None and served_by.resumes:
                            self._world.reach("resumed")
                        return self._end(ask, arrival.output, tokens, expected)
            self._world.reach("client left")
            return "left"
        finally:
            dispatch.close()

    def _end(self, ask: Ask, output: pb.Output, tokens: list[int], expected: list[int]) -> str:
        reason = pb.FinishReason.Name(output.finish_reason).removeprefix("FINISH_REASON_").lower()
        if reason == "length" and len(tokens) != len(expected):
            what = f"request {ask.request_id} ended with {len(tokens)} of {len(expected)} tokens"
            self._world.report(Invariant.RIGHT_TOKENS, what)
        if not output.usage.prefilled_locally and output.usage.prefill_worker_id:
            self._world.reach("handed over")
        if output.usage.fetched:
            self._world.reach("prefix fetched")
        return reason if reason != "error" else f"error: {output.error.message}"

    async def close(self) -> None:
        await self.workers.close()
        await self.index.close()
        await self.membership.close()


def draw_prompt(draw: random.Random) -> list[int]:
    """Prompts of which some begin alike: with one of a few trunks, or with a part of it."""
    trunk = random.Random(draw.randrange(3))
    shared, own = draw.choice([0, 20, 40, 64, 90]), draw.randrange(2, 60)
    return [trunk.randrange(VOCAB_SIZE) for _ in range(shared)] + [draw.randrange(VOCAB_SIZE) for _ in range(own)]
