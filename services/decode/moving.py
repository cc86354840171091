"""Lets live requests go on at another decode worker, with their KV: what the worker that they leave does.

The router decides: it asks (`MoveRequest`) where another worker has room and this one drains, and nothing stops before
that. With the side that each step happens on (E: engine thread, L: event loop):

    asked (L) -> taken out between two steps, its blocks lent to us (E) -> kept under a random id, last output says
    MOVED and the id (L) -> the router sends the order, with the output so far and the id, to another worker
    -> that one takes the blocks by the block protocol -> the keep closes -> blocks freed (E)

    where the request is                       what the asking does
    handoff; prompt being computed here        noted: it leaves once the engine has it, and its prompt is computed
    waits, or preempted: holds no blocks       it leaves at once; the other worker computes its context
    decodes                                    it leaves between two steps
    finished, aborted                          nothing

    what goes wrong afterwards                 what happens
    nobody takes the blocks in time            the keep expires; blocks freed
    the other worker dies, or gives them up    the lease closes; blocks freed
    the router dies                            its other session ends, too: as above
    this worker ends                           the exchange closes all keeps; the other worker computes the context
    they cannot be kept, by a bug of ours      blocks freed; the other worker computes the context

To this worker it is LEAVING from the asking on (`stages.py`), and has ended with MOVED.
"""

from __future__ import annotations

import logging

from tandem.v1 import worker_pb2 as pb

from kvstore.exchange import Keep
from services.decode.live import LiveRequest
from services.engine.api import Suspended
from services.worker.assembly import WorkerParts
from services.worker.settling import Settlements

log = logging.getLogger(__name__)


class Departures:
    """What the requests that leave this worker leave behind."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._kept = Settlements("moved requests")

    def __len__(self) -> int:
        """Counts the requests whose blocks are kept here still."""
        return len(self._kept)

    def keep(self, live: LiveRequest, left: Suspended) -> pb.Output:
        """Keep the blocks for whoever goes on with the request; its last output here, which says where they are."""
        output = pb.Output(handle=live.order.handle, finish_reason=pb.FINISH_REASON_MOVED)
        self._parts.metrics.moved("left")
        if not left.blocks:
            return output
        try:
            keep = self._parts.exchange.keep(live.leaves_under, left.blocks, live.order.request_id)
        except Exception:
            log.exception("blocks could not be kept", extra={"request_id": live.order.request_id})
            self.free(left)
            return output
        self._kept.start(self._free_after(keep, left), name=f"keep-{live.order.request_id}")
        output.move.worker_id = self._parts.worker_id
        output.move.incarnation = self._parts.incarnation
        output.move.transfer_id = keep.transfer_id
        output.move.num_tokens = len(live.prompt_token_ids) + left.num_output_tokens - 1
        return output

    def free(self, left: Suspended) -> None:
        """Give back what nobody goes on with."""
        self._parts.thread.post(self._release, left)

    async def ended(self) -> None:
        """Wait until nothing is kept for anybody."""
        await self._kept.ended()

    async def settled(self) -> None:
        """Wait for the last ones, with the exchange closed."""
        await self._kept.settled()

    async def _free_after(self, keep: Keep, left: Suspended) -> None:
        await keep.closed
        await self._parts.thread.call(self._release, left)

    def _release(self, left: Suspended) -> None:  # engine thread
        self._parts.engine.release_blocks([block.block_id for block in left.blocks])
