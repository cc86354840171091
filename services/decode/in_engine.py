"""The live requests that a decode worker's engine has. All of it belongs to the engine's thread.

What comes of it goes to the event loop, in the order in which it happened.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from services.decode.live import LiveRequest
from services.decode.news import News, news_of_step
from services.decode.stages import LiveEvent
from services.engine.api import Request, StepOutput, Suspended
from services.worker.assembly import WorkerParts


class InEngine:
    """By engine request id."""

    def __init__(
        self,
        parts: WorkerParts,
        tell: Callable[[LiveRequest, LiveEvent, Suspended | None], None],
        deliver: Callable[[Sequence[News]], None],
    ) -> None:
        """`tell` and `deliver` are called on the event loop: what became of a request, what a step brought."""
        self._parts = parts
        self._tell = tell
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._lives: dict[str, LiveRequest] = {}

    def lives(self) -> list[LiveRequest]:
        """A copy. Any thread."""
        return list(self._lives.values())

    def enter(self, live: LiveRequest, request: Request) -> None:
        """Note that the engine has it, as this request."""
        self._lives[request.request_id] = live

    def drop(self, live: LiveRequest) -> None:
        """Have the engine drop it, if it has it."""
        if live.request is not None:
            self._parts.engine.abort(live.request.request_id)
            self._lives.pop(live.request.request_id, None)

    def let_go(self, live: LiveRequest) -> None:
        """Take it out with its blocks, if the engine has it and can: `LET_GO` follows."""
        if live.request is None or live.request.request_id not in self._lives:
            return
        left = self._parts.engine.suspend(live.request.request_id, live.leaves_under)
        if left is not None:
            del self._lives[live.request.request_id]
            self._loop.call_soon_threadsafe(self._tell, live, LiveEvent.LET_GO, left)

    def give_up(self, live: LiveRequest) -> None:
        """Take it out before its first token, its full blocks staying in the cache: `GIVEN_UP` follows."""
        request = live.request
        if live.has_token or request is None or request.request_id not in self._lives:
            return
        self._parts.engine.abort(request.request_id)
        del self._lives[request.request_id]
        self._loop.call_soon_threadsafe(self._tell, live, LiveEvent.GIVEN_UP, None)

    def on_step(self, output: StepOutput) -> None:
        """Deliver what a step brought. Requests of another half of the worker are passed over."""
        news = []
        for update in output.updates:
            live = self._lives.get(update.request.request_id)
            if live is not None and (update.new_tokens or update.finish_reason is not None):
                news += news_of_step(live, update)
                live.has_token = True
                if update.finish_reason is not None:
                    del self._lives[update.request.request_id]
        if news:
            self._loop.call_soon_threadsafe(self._deliver, news)
