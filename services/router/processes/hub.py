"""Passes a process's question on to all processes of the router, and their answers back. Belongs to the event loop.

Who asks the same at the same time shares the answers, so that however many ask, a process hears of each question once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Final

import msgspec

from services.router.processes.channel import Channel
from services.router.processes.messages import METRICS, Answer, Answers, Ask, ToParent
from services.router.processes.series import Snapshot, Totals

log = logging.getLogger(__name__)

_ANSWER_S: Final = 0.5
"""How long a question waits for a process; then the others' answers do without it."""
_MAX_QUESTIONS: Final = 64
"""Different ones at a time; further ones get no answer."""

Question = tuple[str, bytes, int]
"""A view, its arguments, and whom it is for (`Ask.to`)."""


class Hub:
    """The processes that serve, and the questions on their way."""

    def __init__(self) -> None:
        self._channels: dict[int, Channel[ToParent]] = {}
        self._ids = itertools.count(1)
        self._awaited: dict[int, asyncio.Future[list[msgspec.Raw]]] = {}
        self._asked: dict[Question, asyncio.Task[list[msgspec.Raw]]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._totals = Totals()

    @property
    def num_serving(self) -> int:
        return len(self._channels)

    def join(self, number: int, channel: Channel[ToParent]) -> None:
        """From now on the process is asked, too."""
        self._channels[number] = channel

    def leave(self, number: int) -> None:
        """It has ended."""
        if self._channels.pop(number, None) is not None:
            self._totals.end(number)

    def asked(self, channel: Channel[ToParent], ask: Ask) -> None:
        """Answer a process's question, once those that it is for have answered."""
        task = asyncio.create_task(self._serve(channel, ask), name=f"question {ask.view}")
        self._answering.add(task)
        task.add_done_callback(self._on_answered)

    def answered(self, answer: Answer) -> None:
        """Take in what a process answers; too late, it is of no use any more."""
        future = self._awaited.pop(answer.id, None)
        if future is not None and not future.done():
            future.set_result(answer.values)

    def _on_answered(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s crashed", task.get_name(), exc_info=error)

    async def _serve(self, channel: Channel[ToParent], ask: Ask) -> None:
        question = (ask.view, bytes(ask.arguments), ask.to)
        task = self._asked.get(question)
        if task is None:
            if len(self._asked) >= _MAX_QUESTIONS:
                channel.send(Answers(ask.id, []))
                return
            task = self._asked[question] = asyncio.create_task(self._gather(ask), name=f"answers {ask.view}")
            task.add_done_callback(lambda _: self._asked.pop(question))
        await asyncio.wait([task])
        channel.send(Answers(ask.id, task.result()))

    async def _gather(self, ask: Ask) -> list[msgspec.Raw]:
        """What those answer in time that it is for."""
        channels = {number: self._channels[number] for number in sorted(self._channels) if ask.to in (0, number)}
        futures = {number: asyncio.get_running_loop().create_future() for number in channels}
        ids = {number: next(self._ids) for number in channels}
        for number, channel in channels.items():
            self._awaited[ids[number]] = futures[number]
            channel.send(Ask(ids[number], ask.view, ask.arguments))
        if futures:
            await asyncio.wait(futures.values(), timeout=_ANSWER_S)
        for each in ids.values():
            self._awaited.pop(each, None)
        # Nothing of one that has ended meanwhile: its successor counts from 0 again.
        found = {
            number: value
            for number, future in futures.items()
            if future.done() and self._channels.get(number) is channels[number]
            for value in future.result()
        }
        return [self._added_up(found)] if ask.view == METRICS else list(found.values())

    def _added_up(self, found: dict[int, msgspec.Raw]) -> msgspec.Raw:
        for number, value in found.items():
            self._totals.note(number, msgspec.msgpack.decode(value, type=Snapshot))
        return msgspec.Raw(msgspec.msgpack.encode(self._totals.snapshot()))
