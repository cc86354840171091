"""One attempt to have a prompt prefilled elsewhere: order it, pull its blocks, and come back with both or with neither.

    stage      waits for                                   deadline              on abort, deadline, lost peer
    connect    block-protocol handshake                    the exchange's        nothing to undo
    order      `scheduled`, which the Offer comes with     prefill queue         cancel the call, abort the fetch
    transfer   reservation, reads, digests, confirmation   the fetch machine's   the same; blocks return when quiesced
    finish     `finished` with the first token             handoff timeout       the same

The blocks have one owner at every moment: the fetch until its result is ok, then whoever takes the `Handoff`. What an
attempt leaves behind is freed by `dispose`, after the last byte that could still arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

from kvstore.block import BlockHash
from kvstore.errors import IncompatiblePeer, PeerLost, PeerUnreachable
from kvstore.exchange import BlockExchange, Fetch
from kvstore.protocol import FetchResult, Reservation
from services.worker.process import GRPC_OPTIONS

# More prefill workers than one decode worker orders from at a time; old addresses of restarted ones count, too.
_MAX_CHANNELS = 64


class HandoffFailed(Exception):
    """This attempt came to nothing; `cause` is one of a few words for the metric, the message has the rest."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class PromptRefused(Exception):
    """No worker will take this prompt as it stands."""


@dataclass(frozen=True)
class Handoff:
    """A prefilled prompt. `fetched` is None where the first token is also the last, and no blocks were taken."""

    finished: pb.PrefillFinished
    fetched: FetchResult | None


class OrderBroken(Exception):
    """An order's stream ended without a result, by the peer's doing or the network's."""


@dataclass(eq=False)
class _Channel:
    grpc: grpc.aio.Channel
    num_calls: int = 0


class PrefillClients:
    """A gRPC channel per prefill worker, made at first use; the least recently used ones are not kept."""

    def __init__(self) -> None:
        self._channels: OrderedDict[str, _Channel] = OrderedDict()

    async def prefill(self, address: str, order: pb.PrefillRequest) -> AsyncGenerator[pb.PrefillEvent, None]:
        """Send an order and read its events; closing the iterator cancels it. Raises OrderBroken."""
        channel = self._channel(address)
        channel.num_calls += 1
        stub = worker_pb2_grpc.PrefillServiceStub(channel.grpc)  # type: ignore[no-untyped-call]
        call: grpc.aio.UnaryStreamCall[Any, pb.PrefillEvent] = stub.Prefill(order)
        try:
            if len(self._channels) > _MAX_CHANNELS:
                await self.forget(next(iter(self._channels)))
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            raise OrderBroken(f"{error.code().name}: {error.details()}") from error
        except asyncio.CancelledError as error:
            if _is_ordered():
                raise
            raise OrderBroken("its channel was closed") from error
        finally:
            call.cancel()
            channel.num_calls -= 1
            if not channel.num_calls and self._channels.get(address) is not channel:
                await channel.grpc.close()

    async def forget(self, address: str) -> None:
        """Begin afresh with a worker that was gone. Orders that run go on: they know best whether theirs is lost."""
        channel = self._channels.pop(address, None)
        if channel is not None and not channel.num_calls:
            await channel.grpc.close()

    async def close(self) -> None:
        """Close all channels; orders that still run break."""
        for channel in self._channels.values():
            await channel.grpc.close()
        self._channels.clear()

    def _channel(self, address: str) -> _Channel:
        if address not in self._channels:
            self._channels[address] = _Channel(grpc.aio.insecure_channel(address, options=GRPC_OPTIONS))
        self._channels.move_to_end(address)
        return self._channels[address]


def _is_ordered() -> bool:
    """Whether somebody cancels the current task; a CancelledError that nobody ordered is grpc's word for "closed"."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def prefill_remotely(
    order: pb.PrefillRequest,
    target: pb.PrefillTarget,
    expected_hashes: Sequence[BlockHash | None],
    reserve: Callable[[int], Awaitable[Reservation]],
    exchange: BlockExchange,
    clients: PrefillClients,
    dispose: Callable[[Fetch], None],
    finish_timeout_s: float,
) -> Handoff:
    """Run the whole handoff for `order`, whose transfer id and reader are filled in here.

    Raises HandoffFailed where another worker may still serve the prompt, PromptRefused where none will. Whenever it
    does not return the blocks (cancellation included), `dispose` gets the fetch and frees what it leaves.
    """
    try:
        owner = await exchange.connect(target.kv_address)
    except IncompatiblePeer as error:
        raise HandoffFailed("incompatible", str(error)) from error
    except PeerUnreachable as error:
        await clients.forget(target.grpc_address)
        raise HandoffFailed("unreachable", str(error)) from error
    order.transfer_id = os.urandom(16)
    order.reader_peer_id = exchange.identity.peer_id
    try:
        fetch = exchange.fetch(order.transfer_id, owner, expected_hashes, reserve, target.incarnation or None)
    except PeerLost as error:
        raise HandoffFailed("peer_lost", str(error)) from error
    orders = clients.prefill(target.grpc_address, order)
    events = asyncio.create_task(_finished(orders, target.worker_id), name=f"prefill-{order.request_id}")
    # An error that comes after the attempt's own end is nobody's news.
    events.add_done_callback(lambda done: done.cancelled() or done.exception())
    taken = False
    try:
        # A transfer that fails ends the order at once, an order that fails ends the transfer.
        either: list[asyncio.Future[Any]] = [events, fetch.result]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not events.done():
            _check(fetch.result.result())
        finished = await _within(finish_timeout_s, events, target.worker_id)
        if finished.finish_reason != pb.FINISH_REASON_UNSPECIFIED:
            return Handoff(finished, None)
        fetched = _check(await fetch.result)
        taken = True
        return Handoff(finished, fetched)
    finally:
        events.cancel()
        if not taken:
            dispose(fetch)


async def _within(timeout_s: float, events: asyncio.Task[pb.PrefillFinished], worker_id: str) -> pb.PrefillFinished:
    """The order's end, which comes with the last announcement; late it is only where something is broken."""
    try:
        async with asyncio.timeout(timeout_s):
            return await events
    except TimeoutError as error:
        message = f"prefill worker {worker_id} announced all blocks, but no first token within {timeout_s:g} s"
        raise HandoffFailed("finish", message) from error


def _check(result: FetchResult) -> FetchResult:
    if result.failure is not None:
        failure = result.failure
        message = f"transfer failed in stage {failure.stage} ({failure.cause.value}): {failure.detail}"
        raise HandoffFailed(failure.cause.value, message)
    return result


async def _finished(orders: AsyncGenerator[pb.PrefillEvent, None], worker_id: str) -> pb.PrefillFinished:
    """Read the order's events to its end."""
    try:
        async with contextlib.aclosing(orders) as events:
            async for event in events:
                kind = event.WhichOneof("kind")
                if kind == "finished":
                    return event.finished
                if kind == "failed":
                    raise _refusal(event.failed, worker_id)
    except OrderBroken as error:
        raise HandoffFailed("rpc", f"prefill worker {worker_id}: {error}") from error
    raise HandoffFailed("rpc", f"prefill worker {worker_id} ended the order without a result")


def _refusal(error: pb.Error, worker_id: str) -> Exception:
    if error.code == pb.ERROR_CODE_INVALID:
        return PromptRefused(error.message)
    cause = "overloaded" if error.code == pb.ERROR_CODE_OVERLOADED else "refused"
    return HandoffFailed(cause, f"prefill worker {worker_id}: {error.message}")
