"""Asks a router in the test's own loop, without HTTP's bytes: requests go straight to the endpoint."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from services.router.edge import GenerateEndpoint, RouterParts
from services.router.edge.access import AccessRecord
from services.router.openai import CompletionBody, CompletionRenderer, plan_completion


@dataclass
class Answer:
    """What a client got: per choice what its events add up to, and what came beside."""

    events: list[dict[str, object]]
    is_whole: bool

    @property
    def error(self) -> dict[str, object] | None:
        (error,) = [event["error"] for event in self.events if "error" in event] or [None]
        return error  # type: ignore[return-value]

    @property
    def usage(self) -> object:
        return next((event["usage"] for event in reversed(self.events) if event.get("usage")), None)

    @property
    def receipts(self) -> list[dict[str, object]]:
        return next(event["receipt"]["sequences"] for event in reversed(self.events) if "receipt" in event)  # type: ignore[index,call-overload,no-any-return]

    def choices(self) -> dict[int, dict[str, object]]:
        """By index; texts and lists joined."""
        choices: dict[int, dict[str, object]] = {}
        for event in self.events:
            for part in event.get("choices", ()):  # type: ignore[attr-defined]
                whole = choices.setdefault(part["index"], {})
                for name, value in part.items():
                    _join(whole, name, value)
        return choices


def _join(whole: dict[str, object], name: str, value: object) -> None:
    if isinstance(value, dict):
        part = whole.setdefault(name, {})
        assert isinstance(part, dict)
        for key, each in value.items():
            _join(part, key, each)
    elif isinstance(value, str | list) and name in whole and whole[name] is not None:
        whole[name] = whole[name] + value  # type: ignore[operator]
    elif value is not None or name not in whole:
        whole[name] = value


class DirectClient:
    """A client of its completions. One request at a time can hang up."""

    def __init__(self, parts: RouterParts) -> None:
        self.parts = parts
        self._endpoint = GenerateEndpoint(parts, CompletionBody, plan_completion, CompletionRenderer)

    def hang_up(self) -> None:
        """The client that asked last goes away."""
        self._finished.set()

    async def ask(self, **body: object) -> Answer:
        """POST /v1/completions."""
        pieces: list[bytes] = []
        self._finished = finished = asyncio.Event()
        request = [{"type": "http.request", "body": json.dumps({"model": "tiny"} | body).encode()}]

        async def receive() -> dict[str, object]:
            if not request:
                await finished.wait()
            return request.pop() if request else {"type": "http.disconnect"}

        async def send(message: dict[str, object]) -> None:
            if message["type"] == "http.response.body":
                pieces.append(message["body"])  # type: ignore[arg-type]

        state = {"request_id": "asked", "access": AccessRecord("POST", "/v1/completions", self.parts.clock())}
        await self._endpoint({"headers": [], "state": state}, receive, send)
        finished.set()
        text = b"".join(pieces)
        if not body.get("stream") or text.startswith(b"{"):  # refused before it began
            return Answer([json.loads(text)], True)
        lines = [line for line in text.split(b"\n\n") if line.startswith(b"data: {")]
        return Answer([json.loads(line[6:]) for line in lines], False)
