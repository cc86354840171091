"""Serves one router's session on a decode worker: outputs go in, one frame per engine step goes out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from tandem.v1 import worker_pb2 as pb

from services.decode.token_lists import TokenLists
from services.orders import LISTS, MOVES, REDIRECTS, RESUMES
from services.rates import Rates
from services.worker import convert

# A router that reads nothing while this many outputs pile up is hung; its session ends.
MAX_PENDING_OUTPUTS = 65_536
# How soon a router learns of a load that changed without outputs of its own.
_LOAD_INTERVAL_S = 0.25
_MIN_HEARTBEAT_S = 0.05


class SessionOverflow(Exception):
    """The router does not read its frames."""


class RouterSession:
    """The outgoing half of a session. All methods run on the event loop."""

    def __init__(
        self,
        router_id: str,
        number: int,
        incarnation: str,
        load: Callable[[], pb.Load],
        rates: Callable[[], Rates],
        heartbeat_s: float = 0.0,
        stuck: str = "",
        features: Sequence[str] = (),
    ) -> None:
        """`number` is unique among the worker's sessions, past ones included. `rates` gives the same object until there
        is news, and goes out with the load when there is. `heartbeat_s`: a frame goes out at least so often; 0: only
        with news. `stuck`: see `set_stuck`. `features`: those that not every decode worker has.
        """
        self.router_id = router_id
        self.number = number
        self.lists: dict[int, TokenLists] = {}
        """Those that the router has sent, by the numbers that its orders name them by."""
        self._incarnation = incarnation
        self._load = load
        self._rates = rates
        self._heartbeat_s = max(heartbeat_s, _MIN_HEARTBEAT_S) if heartbeat_s > 0 else 0.0
        self._stuck = stuck
        self._features = (RESUMES, MOVES, LISTS, REDIRECTS, *features)
        self._pending: list[pb.Output] = []
        self._handles: list[int] = []
        self._token_ids: list[int] = []
        self._wake = asyncio.Event()
        self._closed = False
        self._overflowed = False
        self._sender: asyncio.Task[None] | None = None

    def push(self, output: pb.Output) -> None:
        """Send it with the next frame."""
        self._pending.append(output)
        self._on_pushed()

    def push_token(self, handle: int, token_id: int) -> None:
        """Send a token of which there is nothing more to say: neither a request's first nor its last."""
        self._handles.append(handle)
        self._token_ids.append(token_id)
        self._on_pushed()

    @property
    def _num_pending(self) -> int:
        return len(self._pending) + len(self._handles)

    def _on_pushed(self) -> None:
        self._wake.set()
        if self._num_pending > MAX_PENDING_OUTPUTS and not self._overflowed:
            self._overflowed = True
            if self._sender is not None:
                self._sender.cancel()  # it may hang in `send`

    def set_stuck(self, stuck: str) -> None:
        """Tell the router at once which parts of the worker stand still; empty: none."""
        self._stuck = stuck
        self._wake.set()

    def close(self) -> None:
        """Let `frames` end once it has sent what is pending."""
        self._closed = True
        self._wake.set()

    async def send_frames(self, send: Callable[[pb.SessionFrame], Awaitable[None]]) -> None:
        """Send frames until `close`; raises SessionOverflow where the router does not keep up."""
        task = self._sender = asyncio.current_task()
        try:
            await self._send_frames(send)
        except asyncio.CancelledError:
            if not self._overflowed or task is None:
                raise
            task.uncancel()
        finally:
            self._sender = None
        if self._overflowed:
            raise SessionOverflow(f"router {self.router_id}: more than {MAX_PENDING_OUTPUTS} outputs unread")

    async def _send_frames(self, send: Callable[[pb.SessionFrame], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        last_load, last_rates, last_stuck = self._load(), self._rates(), self._stuck
        frame = pb.SessionFrame(
            load=last_load,
            incarnation=self._incarnation,
            features=self._features,
            heartbeat_s=self._heartbeat_s,
            stuck=last_stuck,
        )
        frame.load.rates.CopyFrom(convert.rates_to_proto(last_rates))
        await send(frame)
        sent_s = loop.time()
        while not (self._closed and not self._num_pending) and not self._overflowed:
            await self._wait()
            load = self._load()
            is_due = self._heartbeat_s > 0 and loop.time() - sent_s >= 0.9 * self._heartbeat_s
            if self._num_pending or load != last_load or self._stuck != last_stuck or is_due:
                frame = pb.SessionFrame(
                    outputs=self._pending,
                    load=load,
                    handles=self._handles,
                    token_ids=self._token_ids,
                    stuck=self._stuck,
                )
                rates = self._rates()
                if rates is not last_rates:
                    frame.load.rates.CopyFrom(convert.rates_to_proto(rates))
                self._pending, self._handles, self._token_ids = [], [], []
                last_load, last_rates, last_stuck = load, rates, self._stuck
                await send(frame)
                sent_s = loop.time()

    async def _wait(self) -> None:
        """Wait until something is pending, or it is time to look at the load."""
        if not self._num_pending and not self._closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_LOAD_INTERVAL_S, self._heartbeat_s or _LOAD_INTERVAL_S)):
                    await self._wake.wait()
        self._wake.clear()
