"""Runs one connection: reads and beats, feeds the session (`session.py`), carries out what it says.

This connection is also the peer's liveness: UCX does not notice a peer that hangs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kvstore.block import BlockMemory, ProofKey
from kvstore.errors import PeerLost, ProtocolViolation
from kvstore.exchange.framing import FrameStream
from kvstore.exchange.handshake import Introduction
from kvstore.exchange.observer import ExchangeObserver
from kvstore.exchange.read_watch import ReadWatch
from kvstore.protocol import (
    Action,
    Actions,
    Closed,
    ExchangeTimeouts,
    HangUp,
    Have,
    Message,
    OwnerSession,
    Pass,
    Quiesced,
    Read,
    ReaderSession,
    Reserve,
    Resolve,
    StartSend,
    Suspect,
    Take,
    Verify,
    Want,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tools:
    """The tools that all connections of a process share."""

    memory: BlockMemory
    proof_key: ProofKey | None
    timeouts: ExchangeTimeouts
    clock: Callable[[], float]
    observer: ExchangeObserver
    verifier: Executor
    start_task: Callable[[Coroutine[None, None, None]], asyncio.Task[None]]
    """Runs a coroutine as a task that the exchange owns and awaits at its close."""
    passed: Callable[[Connection[OwnerSession], Want | Take | Have | Suspect], None]
    """Hears what a reader says to whoever holds the blocks."""


class Handle(Protocol):
    """One transfer, as its user sees it: carries out what its machine says beyond messages."""

    @property
    def over(self) -> Awaitable[object]:
        """Resolves when nothing of ours touches the transfer's blocks any more."""

    def carry_out(self, action: Action) -> None:
        """Do it, or start to."""


_SessionT = TypeVar("_SessionT", ReaderSession, OwnerSession)


class Connection(Generic[_SessionT]):
    """One established connection. `run` it once; it returns when the connection has ended, with the reason."""

    def __init__(
        self, name: str, stream: FrameStream, introduction: Introduction, session: _SessionT, tools: Tools
    ) -> None:
        self.name = name
        self.peer = introduction.peer
        self.link = introduction.link
        self.transport_name = introduction.transport.name
        self.session: _SessionT = session
        self.tools = tools
        self.reads = ReadWatch(
            tools.memory,
            introduction.link,
            lambda: introduction.transport.num_turns,
            tools.timeouts.peer_timeout_s,
            tools.timeouts.heartbeat_s,
        )
        self.handles: dict[bytes, Handle] = {}
        """By transfer; each stays until it is over."""
        self._stream = stream
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._actions: deque[tuple[bytes, Action]] = deque()
        self._is_acting = False

    @property
    def is_open(self) -> bool:
        """Whether messages can still go both ways, as far as we know."""
        return not self._lost.done()

    def send(self, message: Message) -> None:
        """Queue a message; nothing happens once the connection has ended."""
        if self._lost.done():
            return
        try:
            self._stream.send(message)
        except PeerLost as error:
            self.close(str(error))

    def close(self, reason: str) -> None:
        """End the connection: `run` returns soon. The first reason counts."""
        if not self._lost.done():
            self._lost.set_result(reason)

    def do(self, actions: Actions) -> None:
        """Do what the session says, in order; what an action leads to comes after those already due."""
        self._actions += actions
        if self._is_acting:
            return
        self._is_acting = True
        try:
            while self._actions:
                self._carry_out(*self._actions.popleft())
        finally:
            self._is_acting = False

    def _carry_out(self, transfer_id: bytes, action: Action) -> None:
        match action:
            case HangUp(reason):
                self.close(reason)
            case Pass(message):
                assert isinstance(self.session, OwnerSession), "a reader passes nothing on"
                self.tools.passed(self, message)
            case Reserve() | Read() | Verify() | Resolve() | Quiesced() | StartSend() | Closed():
                self.handles[transfer_id].carry_out(action)
            case _:
                self.send(action)

    async def run(self) -> str:
        """Read and beat until the connection ends, then end its transfers and abort its link; returns why."""
        loops = [asyncio.ensure_future(self._guard(work)) for work in (self._receive, self._beat)]
        reason = "the exchange was cancelled"
        try:
            reason = await self._lost
        finally:
            self.close("cancelled")
            for each in loops:
                each.cancel()
            try:
                self.do(self.session.lose(reason, self.tools.clock()))
            finally:
                self.link.abort(reason)
                await asyncio.gather(*loops, return_exceptions=True)
                await self._stream.close(flush_s=self.tools.timeouts.heartbeat_s)
        return reason

    async def drained(self) -> None:
        """Wait, with the connection ended, until its link and every transfer end, to the last possible byte."""
        await self.link.close()
        await asyncio.gather(*(handle.over for handle in self.handles.values()))

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run one of the two loops; however it fails, the connection ends with the reason."""
        try:
            await work()
        except PeerLost as error:
            self.close(str(error))
        except ProtocolViolation as error:
            logger.warning("%s violates the block protocol, connection closed: %s", self.name, error)
            self.close(f"protocol violation: {error}")
        except Exception as error:
            # A bug of ours costs this connection, and not the worker.
            logger.exception("%s: an internal error, connection closed", self.name)
            self.close(f"internal error: {error!r}")

    async def _receive(self) -> None:
        while True:
            message = await self._stream.receive()
            self.do(self.session.receive(message, self.tools.clock()))

    async def _beat(self) -> None:
        while True:
            self._watch_reads()
            self.do(self.session.tick(self.tools.clock()))
            await asyncio.sleep(self.tools.timeouts.heartbeat_s)

    def _watch_reads(self) -> None:
        if not isinstance(self.session, ReaderSession) or not self.reads.is_reading:
            return
        now = self.tools.clock()
        if self.reads.look(now):
            self.session.bytes_came(now)
        if (problem := self.reads.problem()) is not None:
            self.close(problem)
