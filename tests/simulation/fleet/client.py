"""A simulated client of a router: sends one wish, holds what comes against the right answer, and hears one end of it.

It speaks ASGI, as a server does that has parsed HTTP: the request, what the router sends, and the client's leaving.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from tests.simulation.fleet.wishes import Answer, Wish, is_close
from tests.simulation.pool import Invariant

if TYPE_CHECKING:
    from tests.simulation.fleet.world import FleetWorld

_App = Callable[[dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]

REQUEST_TIMEOUT_S: Final = 40.0
MAX_WORKER_DEATHS: Final = 3
_LATE_S: Final = 3.0
_ROUNDED_S: Final = 1e-6
_DEATH_S: Final = 15.0  # until a router hears that a worker has vanished, and more
_GIVEN_UP: Final = "decode workers were lost with this request aboard"


class Client:
    """One request and its answer. `leaves_after`: so many tokens; None: it stays."""

    def __init__(self, world: FleetWorld, name: str, wish: Wish, leaves_after: int | None = None) -> None:
        self._world = world
        self.name = name
        self.wish = wish
        self._leaves_after = leaves_after
        self._left = world.loop.create_future()
        self._choices = [_Choice(self, answer) for answer in wish.answers]
        self._status = 0
        self._is_over = False
        self._is_done = False
        self._body = b""
        self._error: str | None = None
        self.error_breaks = lambda: Invariant.ONE_OUTCOME
        """Said of an error that nothing explains."""
        self.on_tokens: Callable[[int], None] = lambda num_tokens: None
        """Called with the number of tokens of its first choice, when there are more."""
        self.resumes: list[dict[str, Any]] = []
        """What its receipt says of those of its first choice."""
        self._since_s = world.loop.time()

    def leave(self) -> None:
        """Close the connection."""
        if not self._left.done():
            self._left.set_result(None)

    async def ask(self, app: _App, model: str) -> str:
        """Send it; how it ended: `whole`, `left`, `late` (by its own deadline), or `error: …`."""
        world, wish = self._world, self.wish
        for kind in wish.kinds:
            world.reach(f"asked for: {kind}")
        headers = [(b"content-type", b"application/json"), (b"x-request-id", self.name.encode())]
        if wish.timeout_s:
            headers.append((b"x-envoy-expected-rq-timeout-ms", str(1000 * wish.timeout_s).encode()))
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        messages = [{"type": "http.request", "body": wish.body(model), "more_body": False}]

        async def receive() -> dict[str, object]:
            if not messages:
                await asyncio.shield(self._left)
                return {"type": "http.disconnect"}
            return messages.pop()

        if self._leaves_after == 0:
            self.leave()
        await app({**scope, "client": (self.name.partition(".")[0], 1)}, receive, self._take)
        return self._end()

    async def _take(self, message: dict[str, Any]) -> None:
        """The app's `send`."""
        if self._left.done():
            return
        if self._is_over:
            self.wrong(Invariant.ONE_OUTCOME, f"hears {message} after the end")
        if message["type"] == "http.response.start":
            if self._status:
                self.wrong(Invariant.ONE_OUTCOME, "has two answers")
            self._status = message["status"]
            return
        self._is_over = not message.get("more_body", False)
        if self._status == 200 and self.wish.is_streamed:
            for event in message["body"].split(b"\n\n"):
                if event.startswith(b"data: "):
                    self._take_event(event.removeprefix(b"data: "))
            return
        self._body += message["body"]
        if self._is_over:
            self._take_whole(json.loads(self._body))

    def _take_event(self, data: bytes) -> None:
        if self._is_done or self._error is not None:
            self.wrong(Invariant.ONE_OUTCOME, f"hears {data!r} after the end")
        if data == b"[DONE]":
            self._is_done = True
            return
        event = json.loads(data)
        if "error" in event:
            self._error = event["error"]["message"]
            return
        self._take_choices(event)
        if event.get("receipt"):
            self._note_receipt(event["receipt"])
        if event.get("usage"):
            self._check_usage(event["usage"])
        if self._leaves_after is not None and self._num_tokens() >= self._leaves_after:
            self.leave()

    def _take_whole(self, answer: dict[str, Any]) -> None:
        if self._status != 200:
            self._error = answer["error"]["message"]
            return
        self._is_done = True
        self._take_choices(answer)
        self._check_usage(answer["usage"])
        self._note_receipt(answer["receipt"])

    def _take_choices(self, piece: dict[str, Any]) -> None:
        for each in piece["choices"]:
            self._world.judge(Invariant.RIGHT_TOKENS)
            self._choices[each["index"]].take(each)
            if each["index"] == 0:
                self.on_tokens(len(self._choices[0].token_ids))

    def _check_usage(self, usage: dict[str, Any]) -> None:
        told = usage["prompt_tokens"], usage["completion_tokens"]
        if told != (len(self.wish.prompt), self._num_tokens()):
            self.wrong(Invariant.RIGHT_TOKENS, f"is told {told} tokens, and has {self._num_tokens()}")

    def _num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self._choices)

    def _note_receipt(self, receipt: dict[str, Any]) -> None:
        reach = self._world.reach
        self.resumes = receipt["sequences"][0]["resumes"] if receipt["sequences"][0] else []
        for sequence in filter(None, receipt["sequences"]):
            if sequence["handoff"]["blocks"]:
                reach("handed over")
            for part in sequence["fetched"]:
                reach(f"prefix fetched from {part['tier']}")
            for resume in sequence["resumes"]:
                reach(f"resumed: {resume['reason']}")
                if resume["moved"]:
                    reach("moved with its blocks")
            if len(sequence["resumes"]) > 1:
                reach("resumed, and resumed again")

    def _end(self) -> str:
        took_s = self._world.loop.time() - self._since_s
        patience_s = min(self.wish.timeout_s or REQUEST_TIMEOUT_S, REQUEST_TIMEOUT_S)
        self._world.judge(Invariant.ONE_OUTCOME)
        if took_s > patience_s + _LATE_S:
            self.wrong(Invariant.WAITS_END, f"ends after {took_s:.1f} s, and not after {patience_s:.1f} s")
        if self._left.done():
            return "left"
        if not self._is_over:
            self.wrong(Invariant.ONE_OUTCOME, f"has no end, but status {self._status}")
        if self._error is not None:
            return self._end_in_error(self._error, took_s, patience_s)
        if not self._is_done:
            self.wrong(Invariant.ONE_OUTCOME, "has neither an error nor a regular end")
        for choice in self._choices:
            choice.check_end()
        return "whole"

    def _end_in_error(self, error: str, took_s: float, patience_s: float) -> str:
        is_late = took_s >= patience_s - _ROUNDED_S
        if self.wish.timeout_s and (self._status == 503 or is_late):
            return "late"
        nemesis, is_explained = self._world.nemesis, is_late
        if _GIVEN_UP in error:
            is_explained |= nemesis.num_deaths_since(self._since_s - _DEATH_S) >= MAX_WORKER_DEATHS
        elif self._status in (200, 503):
            is_explained |= nemesis.was_nobody_there(self._since_s)
        if not is_explained:
            self.wrong(self.error_breaks(), f"has an error that nobody ordered: {self._status} {error}")
        return f"error: {self._status} {error}"

    def wrong(self, invariant: Invariant, what: str) -> None:
        self._world.report(invariant, f"request {self.name} {what}")


class _Choice:
    """One choice as it comes, against what it must be."""

    def __init__(self, client: Client, right: Answer) -> None:
        self.token_ids: list[int] = []
        self._client = client
        self._right = right
        self._text = ""
        self._logprobs: list[float] = []
        self._end: tuple[str, str | int | None] | None = None

    def take(self, piece: dict[str, Any]) -> None:
        if self._end is not None:
            self._wrong(Invariant.ONE_OUTCOME, f"goes on after its end: {piece}")
        self.token_ids += piece["token_ids"]
        self._text += piece["text"]
        right = self._right
        if self.token_ids != right.token_ids[: len(self.token_ids)]:
            self._wrong(Invariant.RIGHT_TOKENS, f"got {self.token_ids}, and not {right.token_ids}")
        if not right.text.startswith(self._text):
            self._wrong(Invariant.RIGHT_TOKENS, f"reads {self._text!r}, and not {right.text!r}")
        if piece["logprobs"] is not None:
            self._logprobs += piece["logprobs"]["token_logprobs"]
        if piece["finish_reason"] is not None:
            self._end = piece["finish_reason"], piece["stop_reason"]
        if piece.get("prompt_logprobs"):
            ids = self._client.wish.prompt[1:]
            told = [
                each[str(token_id)]["logprob"] for token_id, each in zip(ids, piece["prompt_logprobs"][1:], strict=True)
            ]
            if not is_close(told, right.prompt_logprobs or ()):
                self._wrong(Invariant.RIGHT_TOKENS, "has other log probabilities of its prompt")

    def check_end(self) -> None:
        """The whole of it is there, and nothing else."""
        right = self._right
        if self._end is None:
            self._wrong(Invariant.ONE_OUTCOME, "has no end")
            return
        got = self.token_ids, self._text, *self._end
        if got != (right.token_ids, right.text, right.finish_reason, right.stop_reason):
            self._wrong(Invariant.RIGHT_TOKENS, f"is {got}, and not {right}")
        if not is_close(self._logprobs, right.logprobs or ()):
            self._wrong(Invariant.RIGHT_TOKENS, f"has log probabilities {self._logprobs}, and not {right.logprobs}")

    def _wrong(self, invariant: Invariant, what: str) -> None:
        self._client.wrong(invariant, what)
