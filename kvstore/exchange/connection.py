"""One established connection of the block protocol: dispatches messages, beats, and notices a peer that is gone.

This connection is also the peer's liveness: UCX does not notice a peer that hangs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine

from kvstore.errors import PeerLost, ProtocolViolation
from kvstore.exchange.framing import FrameStream
from kvstore.protocol import ExchangeTimeouts, Heartbeat, Message

logger = logging.getLogger(__name__)


class Connection:
    """`run` it once; it returns when the connection has ended, with the reason."""

    def __init__(self, stream: FrameStream, name: str, timeouts: ExchangeTimeouts, clock: Callable[[], float]) -> None:
        self.name = name
        self._stream = stream
        self._timeouts = timeouts
        self._clock = clock
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._last_heard = clock()

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

    async def run(self, on_message: Callable[[Message], None], live_transfers: Callable[[], list[bytes]]) -> str:
        """Dispatch messages and beat until the connection ends; returns why.

        `on_message` may raise `ProtocolViolation`. `live_transfers` gives what each heartbeat names.
        """
        receiving = asyncio.ensure_future(self._guard(self._receive(on_message)))
        beating = asyncio.ensure_future(self._guard(self._beat(live_transfers)))
        try:
            return await self._lost
        finally:
            self.close("cancelled")
            receiving.cancel()
            beating.cancel()
            await asyncio.gather(receiving, beating, return_exceptions=True)
            await self._stream.close(flush_s=self._timeouts.heartbeat_s)

    async def _guard(self, work: Coroutine[None, None, None]) -> None:
        """Run one of the two loops; however it fails, the connection ends with the reason."""
        try:
            await work
        except PeerLost as error:
            self.close(str(error))
        except ProtocolViolation as error:
            logger.warning("%s violates the block protocol, connection closed: %s", self.name, error)
            self.close(f"protocol violation: {error}")
        except Exception as error:
            # A bug of ours costs this connection, and not the worker.
            logger.exception("%s: an internal error, connection closed", self.name)
            self.close(f"internal error: {error!r}")

    async def _receive(self, on_message: Callable[[Message], None]) -> None:
        while True:
            message = await self._stream.receive()
            self._last_heard = self._clock()
            on_message(message)

    async def _beat(self, live_transfers: Callable[[], list[bytes]]) -> None:
        timeouts = self._timeouts
        while True:
            self.send(Heartbeat(live_transfers()))
            due = self._clock() + timeouts.heartbeat_s
            await asyncio.sleep(timeouts.heartbeat_s)
            # Where our own loop stood still, the peer's messages wait unread: do not blame the peer for that time.
            stalled_s = max(0.0, self._clock() - due)
            silent_s = self._clock() - self._last_heard - stalled_s
            if silent_s > timeouts.peer_timeout_s:
                raise PeerLost(f"silent for {silent_s:.1f} s, {timeouts.peer_timeout_s} s are allowed")
