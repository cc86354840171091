"""Open-loop clients: requests arrive whatever the servers do, and each answer is held against the quiet one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import httpx

from tests.chaos.fleet import Fleet, Member
from tests.hf_models import random_prompts

HANG_S: Final = 45.0
"""A client that hears nothing for so long gives up, and the run has failed."""
_CONNECT_S: Final = 3.0
_CUT_SHARE: Final = 0.1


class Outcome(StrEnum):
    RIGHT = "right"
    CUT = "cut by its client"
    ROUTER_DIED = "its router died"
    WRONG = "wrong tokens"
    ERROR = "error"
    HUNG = "hung"


ALLOWED: Final = (Outcome.RIGHT, Outcome.CUT, Outcome.ROUTER_DIED)


@dataclass(frozen=True)
class Case:
    """One of the requests that are sent again and again."""

    name: str
    body: dict[str, object]


@dataclass
class Result:
    """What became of a request. `silence_s`: the longest time in which a stream said nothing; `heard_at`: its end."""

    case: Case
    outcome: Outcome
    detail: str = ""
    silence_s: float = 0.0
    heard_at: float = 0.0
    num_resumes: int = 0


@dataclass
class Load:
    """Sends requests at `rate` a second until `stop`; `expected` by case is from the quiet run."""

    fleet: Fleet
    seed: int
    expected: dict[str, list[list[int]]] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(HANG_S, connect=_CONNECT_S), limits=limits)
        self.cases = make_cases()

    async def learn(self) -> None:
        """Ask each case once while nothing is disturbed, and through the other router once more: the answers agree."""
        routers = self.fleet.of_role("router")
        for case in self.cases:
            answers = [await self._answer(case, router, None, Result(case, Outcome.RIGHT)) for router in routers]
            assert answers[0] == answers[1], f"{case.name}: two quiet answers differ"
            self.expected[case.name] = answers[0]

    async def run(self, rate: float, stop: asyncio.Event) -> None:
        """Send until told to stop, then wait for all answers."""
        while not stop.is_set():
            await asyncio.sleep(self._random.expovariate(rate))
            cut_after = self._random.randint(1, 30) if self._random.random() < _CUT_SHARE else None
            case, first = self._random.choice(self.cases), self._random.randrange(2)
            task = asyncio.create_task(self._one(case, first, cut_after))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.gather(*self._tasks)

    async def close(self) -> None:
        await self._http.aclose()

    @property
    def counts(self) -> Counter[Outcome]:
        return Counter(result.outcome for result in self.results)

    # ---- one request ----------------------------------------------------------

    async def _one(self, case: Case, first: int, cut_after: int | None) -> None:
        routers = self.fleet.of_role("router")
        result = Result(case, Outcome.RIGHT)
        began = time.monotonic()
        while True:
            router = routers[first % 2]
            try:
                await self._judge(case, router, cut_after, result)
            except httpx.ConnectError as error:  # a balancer would take the other router, and so do we
                first += 1
                if time.monotonic() - began < READY_S:
                    await asyncio.sleep(0.1)
                    continue
                result.outcome, result.detail = Outcome.ERROR, f"no router takes connections: {error}"
            except _NotReady as error:  # nor would a balancer ask one that is not ready
                first += 1
                if time.monotonic() - began < READY_S:
                    await asyncio.sleep(0.1)
                    continue
                result.outcome, result.detail = Outcome.ERROR, f"no router is ready: {error}"
            except (httpx.ReadTimeout, httpx.ConnectTimeout, TimeoutError):
                result.outcome, result.detail = Outcome.HUNG, f"nothing heard of {router.name} for {HANG_S:g} s"
            except (httpx.HTTPError, _Failed) as error:
                result.outcome, result.detail = Outcome.ERROR, f"{router.name}: {type(error).__name__}: {error}"
            # One that is killed together with its network tells nobody; one that leaves may take a connection yet.
            if result.outcome in (Outcome.ERROR, Outcome.HUNG) and any(end > began - LEAVE_S for end in router.ends):
                result.outcome = Outcome.ROUTER_DIED
            break
        self.results.append(result)

    async def _judge(self, case: Case, router: Member, cut_after: int | None, result: Result) -> None:
        tokens = await self._answer(case, router, cut_after, result)
        expected = self.expected[case.name]
        if cut_after is not None and case.body.get("stream"):
            result.outcome = Outcome.CUT
            expected = [each[: len(got)] for each, got in zip(expected, tokens, strict=True)]
        if tokens != expected:
            result.outcome, result.detail = Outcome.WRONG, f"{router.name}: {tokens} instead of {expected}"

    async def _answer(self, case: Case, router: Member, cut_after: int | None, result: Result) -> list[list[int]]:
        """The token ids of each choice. Raises `_Failed` on any error that the server tells."""
        url, heard = f"{router.http_url}/v1/completions", _Silence(result)
        if not case.body.get("stream"):
            response = await self._http.post(url, json=case.body)
            if response.status_code != 200:
                raise await self._failure(router, response)
            content = response.json()
            result.num_resumes += num_resumes(content)
            return [list(choice["token_ids"]) for choice in sorted(content["choices"], key=lambda each: each["index"])]
        tokens: list[list[int]] = [[] for _ in range(int(str(case.body.get("n", 1))))]
        async with self._http.stream("POST", url, json=case.body) as response:
            if response.status_code != 200:
                raise await self._failure(router, response)
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                heard.end()
                if line == "data: [DONE]":
                    return tokens
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise _Failed(json.dumps(event["error"]))
                result.num_resumes += num_resumes(event)
                for choice in event["choices"]:
                    tokens[choice["index"]] += choice["token_ids"] or []
                if cut_after is not None and sum(map(len, tokens)) >= cut_after:
                    return tokens
        raise _Failed("the stream ended without its last event")

    async def _failure(self, router: Member, response: httpx.Response) -> Exception:
        """What a refusal means: that of a router which is not ready is no more than its balancer's mistake."""
        text = f"{response.status_code}: {(await response.aread()).decode()[:500]}"
        with contextlib.suppress(httpx.HTTPError):
            if response.status_code == 503 and (await self._http.get(f"{router.http_url}/ready")).status_code != 200:
                return _NotReady(text)
        return _Failed(text)


LEAVE_S: Final = 5.0
"""For so long after its signal a router may take connections that it serves no more."""
READY_S: Final = 30.0
"""For so long a client goes from one router to the other in search of one that takes connections."""


class _NotReady(Exception):
    """A router refuses while it is not ready."""


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
