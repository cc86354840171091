"""Open-loop clients: requests arrive whatever the servers do, and each answer is held against the quiet one."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import httpx

from tests.chaos.fleet import Fleet, Member
from tests.hf_models import random_prompts

_HANG_S: Final = 45.0
"""A client that hears nothing for so long gives up, and the run has failed; times the fleet's patience, as the next."""
_ASK_S: Final = 30.0
"""For so long a client goes from one router to the other in search of one that takes its request."""
_LEAVE_S: Final = 5.0
"""For so long after its signal, or after it was cut off, a router may not be itself."""
_CONNECT_S: Final = 3.0
_CUT_SHARE: Final = 0.1


class Outcome(StrEnum):
    RIGHT = "right"
    CUT = "cut by its client"
    WITH_ROUTER = "failed with its router"
    WRONG = "wrong tokens"
    ERROR = "error"
    HUNG = "hung"


ALLOWED: Final = (Outcome.RIGHT, Outcome.CUT, Outcome.WITH_ROUTER)


@dataclass(frozen=True)
class Case:
    """One of the requests that are sent again and again."""

    name: str
    body: dict[str, object]


@dataclass
class Result:
    """What became of a request. `silence_s`: the longest time in which a stream said nothing; `heard_at`: its end.

    `router`: the last one asked, at `asked_at`; `waited_s`: until one took it, where the first did not.
    """

    case: Case
    outcome: Outcome = Outcome.RIGHT
    detail: str = ""
    tokens: list[list[int]] = field(default_factory=list)
    waited_s: float = 0.0
    silence_s: float = 0.0
    heard_at: float = 0.0
    router: Member | None = None
    asked_at: float = 0.0
    num_resumes: int = 0


@dataclass
class Load:
    """Sends requests at `rate` a second until `stop`; `expected` by case is from the quiet run."""

    fleet: Fleet
    seed: int
    num_cases: int
    expected: dict[str, list[list[int]]] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=0)
        self._hang_s, self._ask_s = _HANG_S * self.fleet.patience, _ASK_S * self.fleet.patience
        timeout = httpx.Timeout(self._hang_s, connect=_CONNECT_S * self.fleet.patience)
        self._http = httpx.AsyncClient(timeout=timeout, limits=limits)
        self.cases = make_cases()[: self.num_cases]

    async def learn(self) -> None:
        """Ask each case once while nothing is disturbed, and through the other router once more: the answers agree."""
        routers = self.fleet.of_role("router")
        for case in self.cases:
            answers = [Result(case) for _ in routers]
            for answer, router in zip(answers, routers, strict=True):
                await self._ask(answer, itertools.repeat(router), None)
            assert answers[0].tokens == answers[1].tokens, f"{case.name}: two quiet answers differ"
            self.expected[case.name] = answers[0].tokens

    async def run(self, rate: float, stop: asyncio.Event) -> None:
        """Send until told to stop, then wait for all answers."""
        tasks: list[asyncio.Task[None]] = []
        while not stop.is_set():
            await asyncio.sleep(self._random.expovariate(rate))
            case, first = self._random.choice(self.cases), self._random.randrange(2)
            is_cut = bool(case.body.get("stream")) and self._random.random() < _CUT_SHARE
            tasks.append(asyncio.create_task(self._one(case, first, self._random.randint(1, 30) if is_cut else None)))
        await asyncio.gather(*tasks)

    async def burst(self, num_rounds: int) -> None:
        """Send all cases at once, so many times over, and wait for all answers."""
        pairs = [(case, number) for number in range(num_rounds) for case in self.cases]
        await asyncio.gather(*(self._one(case, number, None) for case, number in pairs))

    async def close(self) -> None:
        await self._http.aclose()

    @property
    def counts(self) -> Counter[Outcome]:
        return Counter(result.outcome for result in self.results)

    # ---- one request ----------------------------------------------------------

    async def _one(self, case: Case, first: int, cut_after: int | None) -> None:
        """One request and its verdict."""
        result, routers = Result(case), self.fleet.of_role("router")
        self.results.append(result)
        try:
            await self._ask(result, itertools.cycle(routers[first:] + routers[:first]), cut_after)
        except (httpx.ReadTimeout, TimeoutError):
            result.outcome, result.detail = Outcome.HUNG, f"silent for {self._hang_s:g} s"
        except (httpx.HTTPError, _Failed, _NotTaken) as error:
            result.outcome, result.detail = Outcome.ERROR, f"{type(error).__name__}: {error}"
        assert result.router is not None
        since = result.asked_at - _LEAVE_S * self.fleet.patience
        # Who hears nothing any more is excused only where its router's end may have been told to nobody.
        is_excused = result.router.ended_since if result.outcome is Outcome.HUNG else result.router.disturbed_since
        if result.outcome is not Outcome.RIGHT and is_excused(since):
            result.outcome = Outcome.WITH_ROUTER
        result.detail = f"{result.router.name}: {result.detail}"
        self._judge(result, cut_after)

    async def _ask(self, result: Result, routers: Iterator[Member], cut_after: int | None) -> None:
        """Ask one router after the other, as a balancer and an SDK would, until one takes the request."""
        began = time.monotonic()
        while True:
            result.router, result.asked_at = next(routers), time.monotonic()
            try:
                return await self._ask_one(result, result.router, cut_after)
            except _NotTaken:
                result.waited_s = time.monotonic() - began
                if result.waited_s > self._ask_s:
                    raise
                await asyncio.sleep(0.1)

    def _judge(self, result: Result, cut_after: int | None) -> None:
        """Hold what came against the quiet answer, to whatever end it came."""
        expected = self.expected[result.case.name]
        if result.outcome is not Outcome.RIGHT or cut_after is not None:
            expected = [each[: len(got)] for each, got in zip(expected, result.tokens, strict=False)]
            if result.outcome is Outcome.RIGHT:
                result.outcome = Outcome.CUT
        if result.tokens != expected:
            result.outcome, result.detail = Outcome.WRONG, f"{result.tokens} instead of {expected}"

    async def _ask_one(self, result: Result, router: Member, cut_after: int | None) -> None:
        """Fill in the token ids of each choice. Raises `_Failed` on any error that the server tells, `_NotTaken`."""
        body, heard = result.case.body, _Silence(result)
        result.tokens = []
        try:
            async with self._http.stream("POST", f"{router.http_url}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response, (await response.aread()).decode()[:500])
                if not body.get("stream"):
                    content = json.loads(await response.aread())
                    result.num_resumes += num_resumes(content)
                    choices = sorted(content["choices"], key=lambda each: int(each["index"]))
                    result.tokens = [list(choice["token_ids"]) for choice in choices]
                    return
                result.tokens = [[] for _ in range(int(str(body.get("n", 1))))]
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    heard.end()
                    if line == "data: [DONE]":
                        return
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise _Failed(json.dumps(event["error"]))
                    result.num_resumes += num_resumes(event)
                    for choice in event["choices"]:
                        result.tokens[choice["index"]] += choice["token_ids"] or []
                    if cut_after is not None and sum(map(len, result.tokens)) >= cut_after:
                        return
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _NotTaken(f"{router.name}: {type(error).__name__}: {error}") from error
        raise _Failed("the stream ended without its last event")


def _refusal(response: httpx.Response, text: str) -> Exception:
    """What a status means: with 503 and Retry-After nothing has begun, and every SDK asks again."""
    text = f"{response.status_code}: {text}"
    return _NotTaken(text) if response.status_code == 503 and "Retry-After" in response.headers else _Failed(text)


class _NotTaken(Exception):
    """A router cannot be reached, or refuses for the moment."""


class _Failed(Exception):
    """The server said that it has failed."""


class _Silence:
    """Keeps the longest time between two events of a stream."""

    def __init__(self, result: Result) -> None:
        self._result = result
        self._last = time.monotonic()

    def end(self) -> None:
        now = time.monotonic()
        if now - self._last > self._result.silence_s:
            self._result.silence_s, self._result.heard_at = now - self._last, now
        self._last = now


def num_resumes(content: dict[str, object]) -> int:
    """How often the sequences of an answer were resumed or moved, as its receipt says."""
    receipt = content.get("receipt")
    sequences = receipt.get("sequences", []) if isinstance(receipt, dict) else []
    return sum(len(each.get("resumes") or []) + len(each.get("moves") or []) for each in sequences)


def make_cases() -> list[Case]:
    """Greedy and sampled, one choice and three, streamed and whole, with log probabilities; prefixes are shared."""
    common = {"model": "m", "return_token_ids": True, "receipt": True, "ignore_eos": True}
    heads = random_prompts([160, 320], seed=5)
    cases = []
    for number, tail in enumerate(random_prompts([5, 20, 40, 70] * 4, seed=6)):
        body = {**common, "prompt": heads[number % 2] + tail, "max_tokens": 60 + 15 * (number % 5)}
        body |= {"temperature": 0} if number % 3 else {"temperature": 0.9, "top_p": 0.95, "seed": 1000 + number}
        body |= {"stream": number % 4 != 3}
        if number % 5 == 2:
            body |= {"n": 3, "temperature": 0.8, "seed": 2000 + number}
        if number % 7 == 3:
            body |= {"logprobs": 2}
        if number % 6 == 5:
            body |= {"presence_penalty": 0.5, "frequency_penalty": 0.3}
        cases.append(Case(f"case {number}", body))
    return cases
