"""One stream after the other whose worker is killed, or drained, when its client has so many tokens: each in turn.

    python -m tests.simulation.fleet.matrix      # all tokens of all kinds of stream; how long it took

A fleet to which nothing else happens. What is lost or moved, and what is computed again, the receipt says.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from services.decode.service import DecodeService
from services.engine.request import SamplingParams
from tests.simulation.fleet.client import Client
from tests.simulation.fleet.computation import VOCAB_SIZE
from tests.simulation.fleet.wishes import Wish
from tests.simulation.fleet.world import END_S, SERVE_S, FleetWorld, verdict_of
from tests.simulation.ledger import Report
from tests.simulation.plan import Plan
from tests.simulation.pool import Invariant

NUM_TOKENS: Final = 64
_NUM_PROMPT_TOKENS: Final = 40
How = Literal["kill", "drain"]


class Kind(NamedTuple):
    """Of a stream."""

    is_sampled: bool
    n: int
    has_logprobs: bool
    has_stop: bool


KINDS: Final = [Kind(*each) for each in itertools.product((False, True), (1, 3), (False, True), (False, True))]


def wish_of(kind: Kind, seed: int) -> Wish:
    """A stream of so many tokens; with a stop string the first choice ends some before."""
    prompt = tuple(random.Random(seed).choices(range(VOCAB_SIZE), k=_NUM_PROMPT_TOKENS))
    params = SamplingParams(
        temperature=float(kind.is_sampled), max_tokens=NUM_TOKENS, seed=5, logprobs=2 if kind.has_logprobs else None
    )
    wish = Wish(prompt, params, n=kind.n)
    if not kind.has_stop:
        return wish
    text = wish.answers[0].text
    stop = next(text[i : i + 3] for i in range(len(text) - 5, 0, -1) if text.find(text[i : i + 3]) == i)
    return Wish(prompt, params, n=kind.n, stop=stop)


def simulate_matrix(kind: Kind, how: How, indices: Sequence[int]) -> Report:
    """Run a fleet in which the worker of one stream after the other ends at each of these tokens."""
    world = FleetWorld(Plan(0, "fleet", only=frozenset()))
    return verdict_of(world, world.undisturbed(_Ends(world, kind, how, indices).run), END_S + 10 * SERVE_S)


class _Ends:
    def __init__(self, world: FleetWorld, kind: Kind, how: How, indices: Sequence[int]) -> None:
        self._world = world
        self._kind = kind
        self._how = how
        self._indices = indices

    async def run(self) -> None:
        for index in self._indices:
            await self._world.all_serve()
            await self._end_at(index)

    async def _end_at(self, index: int) -> None:
        world = self._world
        client = Client(world, f"{self._how}.{index}", wish_of(self._kind, seed=index))
        ended: list[str] = []

        def look(num_tokens: int) -> None:
            if num_tokens >= index and not ended:
                ended.append(self._serving(client.name))
                world.loop.call_soon(self._end, ended[0])

        client.on_tokens = look
        num_tokens = len(client.wish.answers[0].token_ids)
        asking = world.within(world.router.process, world.router.serve(client))
        await world.comes_true(asking.done, SERVE_S)
        how = asking.result() if asking.done() else "no end"
        if how != "whole" or (index <= num_tokens and not ended):
            client.wrong(Invariant.ONE_OUTCOME, f"ends so: {how}, and {ended or 'nobody'} was ended")
        if index < num_tokens and not client.resumes and self._how == "kill":
            client.wrong(Invariant.ONE_OUTCOME, "does not know that its worker was killed")
        for resume in client.resumes:
            world.reach(f"{self._how}: {resume['reason']}")
            if self._how == "drain" and resume["pause_seconds"] is not None and resume["recomputed_tokens"]:
                client.wrong(Invariant.ONE_OUTCOME, f"was computed again: {resume}")

    def _serving(self, request: str) -> str:
        """The worker that has its first choice."""
        (name,) = (
            name
            for name, worker in self._world.workers.items()
            if isinstance(worker.service, DecodeService)
            for lives in worker.service._sessions.values()
            for live in lives.values()
            if live.order.request_id in (request, f"{request}-0")
        )
        return name

    def _end(self, name: str) -> None:
        world = self._world
        if self._how == "kill":
            world.kill(name, silently=False)
            world.start(name)
        else:
            world.nemesis.drain(world.workers[name])


def main() -> int:
    num_failed, start_s = 0, time.process_time()
    for kind, how in itertools.product(KINDS, ("kill", "drain")):
        report = simulate_matrix(kind, how, range(1, NUM_TOKENS + 1))  # type: ignore[arg-type]
        num_failed += bool(report.violations)
        told = {what: count for what, count in report.reached.items() if what.startswith(how)}
        print(kind, how, told, *report.violations[:1], flush=True)
    print(f"{num_failed} failed, {time.process_time() - start_s:.1f} s of a core")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
