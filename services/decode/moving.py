"""Lets live requests go on at another decode worker, with their KV: what the worker that they leave does.

The router decides: it asks (`MoveRequest`) where another worker has room and this one drains, and nothing stops before
that. With the side that each step happens on (E: engine thread, L: event loop):

    asked (L) -> taken out between two steps, its blocks lent to us (E) -> kept under a random id, last output says
    MOVED and the id (L) -> the router sends the order, with the output so far and the id, to another worker
    -> that one takes the blocks by the block protocol -> the keep closes -> blocks freed (E)

    where the request is                       what the asking does
    handoff; prompt being computed here        noted: it leaves after its first step here
    waits, or preempted: holds no blocks       it leaves at once; the other worker computes its context
    decodes                                    it leaves between two steps
    finished, aborted                          nothing

    what goes wrong afterwards                 what happens
    nobody takes the blocks in time            the keep expires; blocks freed
    the other worker dies, or gives them up    the lease closes; blocks freed
    the router dies                            its other session ends, too: as above
    this worker ends                           the exchange closes all keeps; the other worker computes the context

What an abort finds: until MOVED is sent the request is live as any other, and blocks that come out of the engine for it
are freed; from then on it has ended here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tandem.v1 import worker_pb2 as pb

from kvstore.exchange import Keep
from services.decode.live import LiveRequest
from services.engine.api import Suspended
from services.worker.assembly import WorkerParts
from services.worker.settling import Settlements


class Departures:
    """The requests that leave this worker. `finish` sends a live request's last output, on the event loop."""

    def __init__(self, parts: WorkerParts, finish: Callable[[LiveRequest, pb.Output], None]) -> None:
        self._parts = parts
        self._finish = finish
        self._loop = asyncio.get_running_loop()
        self._kept = Settlements("moved requests")

    def __len__(self) -> int:
        """Counts the requests whose blocks are kept here still."""
        return len(self._kept)

    def suspend(self, live: LiveRequest) -> bool:
        """Take it out of the engine, if it can go now; whether it has gone. Engine thread."""
        if live.request is None:
            return False
        left = self._parts.engine.suspend(live.request.request_id, live.leaves_under)
        if left is None:
            return False
        self._loop.call_soon_threadsafe(self._left, live, left)
        return True

    async def ended(self) -> None:
        """Wait until nothing is kept for anybody."""
        await self._kept.ended()

    async def settled(self) -> None:
        """Wait for the last ones, with the exchange closed."""
        await self._kept.settled()

    def _left(self, live: LiveRequest, left: Suspended) -> None:
        block_ids = [block.block_id for block in left.blocks]
        if live.is_finished:  # aborted meanwhile
            self._parts.thread.post(self._parts.engine.release_blocks, block_ids)
            return
        output = pb.Output(handle=live.order.handle, finish_reason=pb.FINISH_REASON_MOVED)
        if left.blocks:
            request_id = live.order.request_id
            keep = self._parts.exchange.keep(live.leaves_under, left.blocks, request_id)
            self._kept.start(self._free_after(keep, block_ids), name=f"keep-{request_id}")
            output.move.worker_id = self._parts.worker_id
            output.move.incarnation = self._parts.incarnation
            output.move.transfer_id = keep.transfer_id
            output.move.num_tokens = len(live.prompt_token_ids) + left.num_output_tokens - 1
        self._parts.metrics.moved("left")
        self._finish(live, output)

    async def _free_after(self, keep: Keep, block_ids: list[int]) -> None:
        await keep.closed
        await self._parts.thread.call(self._parts.engine.release_blocks, block_ids)
