"""One process of several that are one router: asks the others, answers them, and hears of its parent's end."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import msgspec

from services.router.processes.channel import Channel, receive_first
from services.router.processes.messages import Answer, Answers, Ask, Beat, Serving, Start, ToChild

log = logging.getLogger(__name__)

BEAT_S: Final = 1.0
_PATIENCE_S: Final = 2.0
"""Of who asks. The parent answers after a quarter of that at the latest, unless it hangs."""
_DECODER = msgspec.msgpack.Decoder(ToChild)

Answering = Callable[[str, Sequence[object]], object]
"""Answers for this process: a view's name, its arguments. May raise."""


class NoAnswer(Exception):
    """Nobody has answered in time."""


@dataclass
class Member:
    """Made before there is an event loop; `joined` is its life there."""

    start: Start
    listener: socket.socket
    _control: socket.socket
    _channel: Channel[ToChild] | None = None
    _ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    _asked: dict[int, asyncio.Future[list[msgspec.Raw]]] = field(default_factory=dict)

    @classmethod
    def first_word(cls, control: socket.socket, listener: socket.socket) -> Member | None:
        """Wait for the parent to say what this process is to be; None: it has gone."""
        start = receive_first(control, _DECODER)
        if start is None:
            return None
        assert isinstance(start, Start), f"a parent that begins with {type(start).__name__}"
        return cls(start, listener, control)

    @asynccontextmanager
    async def joined(self, answering: Answering, on_lost: Callable[[], None]) -> AsyncIterator[None]:
        """Answer what the others ask, from now on. `on_lost`: the parent has gone, and this process is to end."""
        self._control.setblocking(False)
        self._channel = channel = await Channel.open(self._control, _DECODER)
        tasks = [
            asyncio.create_task(self._listen(channel, answering, on_lost), name="the parent's word"),
            asyncio.create_task(_beat(channel), name="beats"),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # a crash was logged when it happened
            channel.close()

    def say_serving(self) -> None:
        """It takes connections."""
        assert self._channel is not None, "nobody serves who has not joined"
        self._channel.send(Serving())

    async def gather(self, view: str, arguments: Sequence[object], to: int = 0) -> list[object]:
        """Ask all processes, this one among them, or the one of that number; returns who has answered, one at least.

        Raises NoAnswer.
        """
        assert self._channel is not None, "nobody asks who has not joined"
        number = next(self._ids)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                self._channel.send(Ask(number, view, msgspec.Raw(msgspec.msgpack.encode(arguments)), to))
                values = await future
        except TimeoutError:
            values = []
        finally:
            del self._asked[number]
        if not values and not to:
            raise NoAnswer(f"no process of this router has answered {view!r} in time")
        return [msgspec.msgpack.decode(value) for value in values]

    async def _listen(self, channel: Channel[ToChild], answering: Answering, on_lost: Callable[[], None]) -> None:
        try:
            while (message := await channel.receive()) is not None:
                if isinstance(message, Ask):
                    self._answer(channel, answering, message)
                elif isinstance(message, Answers):
                    future = self._asked.get(message.id)
                    if future is not None and not future.done():
                        future.set_result(message.values)
            log.error("the parent of this router's processes has gone: finishing what runs")
        finally:
            on_lost()

    def _answer(self, channel: Channel[ToChild], answering: Answering, ask: Ask) -> None:
        values = []
        try:
            value = answering(ask.view, msgspec.msgpack.decode(ask.arguments, type=list[object]))
            values = [msgspec.Raw(msgspec.msgpack.encode(value))]
        except Exception:  # the others answer without us
            log.exception("a sibling's question (%s) crashed", ask.view)
        channel.send(Answer(ask.id, values))


async def _beat(channel: Channel[ToChild]) -> None:
    while True:
        channel.send(Beat())
        await asyncio.sleep(BEAT_S)
