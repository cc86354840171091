"""Writes one request's answer, whole or as events. How a choice looks, each endpoint says."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import orjson

from services.router import sse
from services.router.openai.choice import Delta
from services.router.openai.columns import default, in_pieces
from services.router.openai.generation import Generation

_PLACE = "\0"  # of the text, in an event that is none
# Of positions with all their alternatives: half a millisecond.
_POSITIONS_AT_ONCE = 16


class Renderer(ABC):
    """An endpoint's way of writing answers; one object per request."""

    id_prefix: ClassVar[str]
    answer: ClassVar[str]
    chunk: ClassVar[str]
    """The `object` of a whole answer, and of an event."""

    def __init__(self, generation: Generation, created_unix_s: int) -> None:
        self._generation = generation
        self._plan = plan = generation.plan
        self._request, self._body = plan.request, plan.request.body
        self._wants_logprobs = plan.wants_logprobs
        varies = (self._wants_logprobs, self._body.return_token_ids, self._body.stream_options.continuous_usage_stats)
        self._is_plain = not any(varies)
        """Events differ by their text alone."""
        self._around: dict[int, tuple[bytes, bytes]] = {}  # by choice, once its first event is written
        self._head = {
            "id": f"{self.id_prefix}-{plan.request_id}",
            "created": created_unix_s,
            "model": plan.model.name,
        }

    @abstractmethod
    def _news(self, delta: Delta) -> dict[str, object] | None:
        """The choice in a delta's event; None if there is nothing new.

        Tokens make an event even where they have no text (a part of a character, a special token): clients that
        measure take the gaps between events for those between tokens.
        """

    @abstractmethod
    def _whole(self, delta: Delta) -> dict[str, object]:
        """The choice in a whole answer."""

    def _more(self, first: Delta) -> dict[str, object]:
        """What a whole answer says beside choices and usage."""
        return {}

    @abstractmethod
    async def show_logprobs(self, delta: Delta) -> None:
        """Turns a delta's log probabilities into what its event or answer has of them.

        A few positions at a time: others are served between. Every delta comes here, in order, if any were asked for.
        """

    def opening(self) -> bytes:
        """Opens a stream with nothing: no token, no chunk."""
        return b""

    def event(self, delta: Delta) -> bytes:
        """The event for a delta, empty if there is nothing new."""
        around = self._around.get(delta.index)
        if around is not None and delta.token_ids and delta.finish_reason is None:
            return around[0] + orjson.dumps(delta.text) + around[1]
        choice = self._news(delta)
        if choice is None:
            return b""
        event = sse.event(self._chunk(choice, delta.index), default)
        if around is None and self._is_plain:
            self._around[delta.index] = self._around_text(delta.index)
        return event

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        """What is before and behind the text in all further events of a choice but its last."""
        choice = self._news(Delta(index, _PLACE, [0]))
        assert choice is not None  # it has a token
        # Nothing behind the text is a client's.
        before, _, behind = sse.event(self._chunk(choice, index), default).rpartition(orjson.dumps(_PLACE))
        return before, behind

    def last_event(self) -> bytes:
        """The event after the last choice's end, with what the client asked to be told of the whole; empty if none."""
        told: dict[str, object] = {}
        if self._body.stream_options.include_usage:
            told["usage"] = self._generation.usage().to_json()
        told |= self._receipt()
        return sse.event({**self._head, "object": self.chunk, "choices": [], **told}) if told else b""

    def response(self, deltas: Sequence[Delta]) -> list[bytes | bytearray]:
        """The whole answer, in pieces; `deltas` holds one complete delta per sequence, in order."""
        payload = {
            **self._head,
            "object": self.answer,
            "choices": list(map(self._whole, deltas)),
            "usage": self._generation.usage().to_json(),
        }
        return in_pieces(payload | self._more(deltas[0]) | self._receipt())

    def _chunk(self, choice: dict[str, object], index: int) -> dict[str, object]:
        payload: dict[str, object] = {**self._head, "object": self.chunk, "choices": [choice]}
        if self._body.stream_options.continuous_usage_stats:
            payload["usage"] = self._generation.usage_of(index).to_json()
        elif self._body.stream_options.include_usage:
            payload["usage"] = None
        return payload

    def _receipt(self) -> dict[str, object]:
        receipt = self._generation.receipt()
        return {} if receipt is None else {"receipt": receipt}


async def in_turns(render: Callable[[int], None], count: int) -> None:
    """`render` of each number below `count`."""
    for number in range(count):
        if number % _POSITIONS_AT_ONCE == _POSITIONS_AT_ONCE - 1:
            await asyncio.sleep(0)
        render(number)
