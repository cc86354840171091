"""Tries once to have a prompt prefilled elsewhere: orders it, pulls its blocks; returns both or neither.

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
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tandem.v1 import worker_pb2 as pb

from kvstore.block import BlockHash
from kvstore.errors import IncompatiblePeer, PeerLost, PeerUnreachable
from kvstore.exchange import BlockExchange, Fetch
from kvstore.protocol import FetchCause, FetchResult, FetchState, Reservation
from services.orders import Orders, StreamBroken, WorkerSilent

NOT_JOINED: Final = "join"
"""Cause of a failed handoff: blocks and token came, and our own engine did not take them."""

SILENT: Final = "silent"
"""The prefill worker's blocks could be reached, and it did not answer an order."""


class HandoffFailed(Exception):
    """This attempt came to nothing; `cause` is one of a few words for the metric, the message has the rest."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class NoRoomHere(HandoffFailed):
    """It was computed, and no room came for it in time: the worker that has it should wait for us no longer."""


@dataclass(frozen=True)
class Handoff:
    """A prefilled prompt. `fetched` is None where the first token is also the last, and no blocks were taken."""

    finished: pb.PrefillFinished
    fetched: FetchResult | None


async def prefill_remotely(
    order: pb.PrefillRequest,
    target: pb.PrefillTarget,
    expected_hashes: Sequence[BlockHash | None],
    reserve: Callable[[int], Awaitable[Reservation]],
    exchange: BlockExchange,
    orders: Orders,
    dispose: Callable[[Fetch], None],
    finish_timeout_s: float,
) -> Handoff:
    """Run the whole handoff for `order`, whose transfer id and reader are filled in here.

    Raises HandoffFailed, after which another worker may still serve the prompt: our own engine takes it, so what that
    worker finds wrong with it is a limit of its own. Whenever it does not return the blocks (cancellation included),
    `dispose` gets the fetch and frees what it leaves.
    """
    try:
        owner = await exchange.connect(target.kv_address)
    except IncompatiblePeer as error:
        raise HandoffFailed("incompatible", str(error)) from error
    except PeerUnreachable as error:
        await orders.forget(target.grpc_address)
        raise HandoffFailed("unreachable", str(error)) from error
    order.transfer_id = exchange.new_id()
    order.reader_peer_id = exchange.identity.peer_id
    try:
        fetch = exchange.fetch(order.transfer_id, owner, expected_hashes, reserve, target.incarnation or None)
    except PeerLost as error:
        raise HandoffFailed("peer_lost", str(error)) from error
    call = orders.prefill(target.grpc_address, order)
    events = asyncio.create_task(_finished(call, target.worker_id), name=f"prefill-{order.request_id}")
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
        if finished.num_resumed_tokens != len(order.resumed_token_ids):
            # Of another version: its token belongs to another place.
            raise HandoffFailed("incompatible", f"prefill worker {target.worker_id} resumes no output")
        has_more = len(order.resumed_token_ids) + 1 < order.sampling.max_tokens
        if finished.finish_reason == pb.FINISH_REASON_LENGTH and has_more:
            raise HandoffFailed("refused", f"the context of prefill worker {target.worker_id} ends with this token")
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
        is_for_room = failure.cause is FetchCause.TIMEOUT and failure.stage == FetchState.RESERVING.value
        raise (NoRoomHere if is_for_room else HandoffFailed)(failure.cause.value, message)
    return result


async def _finished(call: AsyncGenerator[pb.PrefillEvent, None], worker_id: str) -> pb.PrefillFinished:
    """Read the order's events to its end."""
    try:
        async with contextlib.aclosing(call) as events:
            async for event in events:
                kind = event.WhichOneof("kind")
                if kind == "finished":
                    return event.finished
                if kind == "failed":
                    raise _refusal(event.failed, worker_id)
    except WorkerSilent as error:
        raise HandoffFailed(SILENT, f"prefill worker {worker_id}: {error}") from error
    except StreamBroken as error:
        raise HandoffFailed("rpc", f"prefill worker {worker_id}: {error}") from error
    raise HandoffFailed("rpc", f"prefill worker {worker_id} ended the order without a result")


def _refusal(error: pb.Error, worker_id: str) -> HandoffFailed:
    causes = {pb.ERROR_CODE_OVERLOADED: "overloaded", pb.ERROR_CODE_DEADLINE: "deadline"}
    cause = causes.get(error.code, "refused")
    return HandoffFailed(cause, f"prefill worker {worker_id}: {error.message}")
