"""The shell around the reader's state machines: the fetches of one connection, their timers, messages and reads."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final

from kvstore.block import BlockHash, BlockMemory, find_wrong
from kvstore.errors import KVStoreError, ProtocolViolation, ReadFailed
from kvstore.exchange.alarm import Alarm
from kvstore.exchange.connection import Connection
from kvstore.exchange.handshake import Introduction
from kvstore.exchange.observer import ExchangeObserver
from kvstore.protocol import (
    HEARS_SUSPICIONS,
    MAX_HASHES,
    MAX_REQUEST_ID_CHARS,
    WANTS_NAME_REQUESTS,
    AbortOrdered,
    AbortReads,
    Announce,
    BlocksAnnounced,
    ConfirmAnswered,
    Confirmed,
    ExchangeTimeouts,
    FetchAction,
    FetchCause,
    FetchEvent,
    FetchMachine,
    FetchResult,
    FetchTimer,
    Heartbeat,
    Message,
    Offer,
    Offered,
    OwnerLost,
    Quiesced,
    ReadEnded,
    ReaderMessage,
    ReadGranted,
    ReadLimits,
    ReadRefused,
    ReadRequest,
    Release,
    Reservation,
    Reserve,
    Reserved,
    ReserveFailed,
    Resolve,
    Revoke,
    Revoked,
    SendMessage,
    StartRead,
    Suspect,
    Verified,
    Verify,
    Want,
)
from kvstore.transport import Run, coalesce

logger = logging.getLogger(__name__)

# Neighbouring blocks travel as one piece up to this size: enough to hide the cost of a piece, small enough to pipeline.
_MAX_RUN_BYTES: Final = 4 * 1024 * 1024
# Below this, verifying in the loop is quicker than handing it to a thread (measured: 15 GB/s against 0.1 ms).
_MAX_INLINE_BYTES: Final = 512 * 1024

ReserveFunction = Callable[[int], Awaitable[Reservation]]
"""Finds room for so many blocks."""


@dataclass(frozen=True)
class ReaderTools:
    """What all fetches of a worker share."""

    memory: BlockMemory
    clock: Callable[[], float]
    observer: ExchangeObserver
    digest_executor: Executor
    start_task: Callable[[Coroutine[None, None, None]], asyncio.Task[None]]
    """Runs a coroutine as a task that the exchange owns and awaits at its close."""
    limits: ReadLimits


class ReaderSession:
    """Our connection to one owner. Holds its fetches by transfer id until they are quiesced."""

    def __init__(self, introduction: Introduction, connection: Connection, tools: ReaderTools) -> None:
        self.peer = introduction.peer
        self.link = introduction.link
        self.transport_name = introduction.transport.name
        self.two_sided = introduction.transport.two_sided
        self.connection = connection
        self.tools = tools
        self._features = introduction.features
        self.fetches: dict[bytes, Fetch] = {}
        self.next_read_id = itertools.count(1).__next__
        self._max_run_blocks = max(1, _MAX_RUN_BYTES // tools.memory.block_bytes)
        # Two-sided reads asked for and not yet granted.
        self._ungranted: dict[int, tuple[Fetch, list[Run]]] = {}

    def live_transfers(self) -> list[bytes]:
        """The transfers whose leases our heartbeats renew: those that may still succeed."""
        return [transfer_id for transfer_id, fetch in self.fetches.items() if not fetch.has_result]

    def on_message(self, message: Message) -> None:
        """Handle a message of the owner's. Raises `ProtocolViolation`."""
        match message:
            case Heartbeat():
                pass
            case Offer(transfer_id, num_blocks):
                if transfer_id in self.fetches:
                    self.fetches[transfer_id].handle(Offered(num_blocks))
                else:
                    self.connection.send(Release(transfer_id, "nobody here waits for this transfer"))
            case Announce(transfer_id, first_index, blocks, last):
                self._tell(transfer_id, BlocksAnnounced(first_index, blocks, last))
            case Confirmed(transfer_id, held):
                self._tell(transfer_id, ConfirmAnswered(held))
            case Revoke(transfer_id, reason):
                self._tell(transfer_id, Revoked(reason))
            case ReadGranted(read_id):
                fetch, runs = self._take_ungranted(read_id)
                fetch.read(read_id, runs)
            case ReadRefused(read_id, reason):
                fetch, _ = self._take_ungranted(read_id)
                fetch.handle(ReadEnded(read_id, FetchCause.REFUSED, reason))
            case _:
                raise ProtocolViolation(f"an owner sent {type(message).__name__}")

    def want(self, transfer_id: bytes, hashes: Sequence[BlockHash], request_id: str) -> None:
        """Ask the owner for the longest prefix of these blocks that it holds, in the name of a request if it is one's.

        An owner that does not know that field would take it for a violation; then it is left out.
        """
        known = request_id[:MAX_REQUEST_ID_CHARS] if WANTS_NAME_REQUESTS in self._features else ""
        self.connection.send(Want(transfer_id, list(hashes[:MAX_HASHES]), known))

    def send(self, message: ReaderMessage) -> None:
        """Send what a fetch says; a suspicion only to an owner that knows what to do with it."""
        if not isinstance(message, Suspect) or HEARS_SUSPICIONS in self._features:
            self.connection.send(message)

    def start_read(self, fetch: Fetch, action: StartRead) -> None:
        """Read over the link; two-sided links need the owner's grant first."""
        runs = coalesce(action.remote_ids, action.local_ids, self._max_run_blocks)
        if not self.two_sided:
            fetch.read(action.read_id, runs)
        elif not self.connection.is_open:
            fetch.handle(ReadEnded(action.read_id, FetchCause.PEER_LOST, "the connection has ended"))
        else:
            # runs count blocks in the owner's pool; the request counts lease indexes, which rise by one along the read
            firsts = itertools.accumulate((run.num_blocks for run in runs), initial=action.indexes[0])
            wanted = [(first, run.num_blocks) for first, run in zip(firsts, runs, strict=False)]
            self._ungranted[action.read_id] = (fetch, runs)
            self.connection.send(ReadRequest(action.read_id, fetch.transfer_id, wanted))

    def connection_lost(self, detail: str) -> None:
        """Fail all fetches, and end the reads that were never granted; the link's teardown ends the others."""
        for fetch in list(self.fetches.values()):
            fetch.handle(OwnerLost(detail))
        ungranted, self._ungranted = self._ungranted, {}
        for read_id, (fetch, _) in ungranted.items():
            fetch.handle(ReadEnded(read_id, FetchCause.PEER_LOST, detail))

    async def drained(self) -> None:
        """Wait until every fetch is quiesced."""
        await asyncio.gather(*(fetch.quiesced for fetch in self.fetches.values()))

    def _tell(self, transfer_id: bytes, event: FetchEvent) -> None:
        if transfer_id in self.fetches:  # else it was over before the owner heard of it
            self.fetches[transfer_id].handle(event)

    def _take_ungranted(self, read_id: int) -> tuple[Fetch, list[Run]]:
        if read_id not in self._ungranted:
            raise ProtocolViolation(f"an answer to read {read_id}, which nobody has asked for")
        return self._ungranted.pop(read_id)


class Fetch:
    """One transfer, as its reader sees it: `result` first, `quiesced` then or later. Both always resolve."""

    def __init__(
        self,
        session: ReaderSession,
        transfer_id: bytes,
        expected_hashes: Sequence[BlockHash | None],
        reserve: ReserveFunction,
        timeouts: ExchangeTimeouts,
        may_be_fewer: bool = False,
    ) -> None:
        loop, tools = asyncio.get_running_loop(), session.tools
        self.transfer_id = transfer_id
        self._context = contextvars.copy_context()  # what is logged of a transfer names the request that began it
        self._session = session
        self._tools = tools
        self._reserve = reserve
        self._ordered_at = tools.clock()
        self._machine = FetchMachine(
            transfer_id,
            expected_hashes,
            tools.memory.block_bytes,
            timeouts,
            session.next_read_id,
            self._ordered_at,
            tools.limits,
            may_be_fewer,
        )
        self._actions: deque[FetchAction] = deque()
        self._carrying_out = False
        self._alarm = Alarm(tools.clock, lambda: self.handle(FetchTimer()))
        self._result: asyncio.Future[FetchResult] = loop.create_future()
        self._quiesced: asyncio.Future[list[int]] = loop.create_future()
        self._alarm.set(self._machine.next_deadline)

    @property
    def result(self) -> asyncio.Future[FetchResult]:
        """The outcome; never an exception. Safe to cancel."""
        return asyncio.shield(self._result)

    @property
    def quiesced(self) -> asyncio.Future[list[int]]:
        """Resolves when no late byte can arrive any more, with the blocks that the caller must free ([] after success).

        Never before `result`. Safe to cancel.
        """
        return asyncio.shield(self._quiesced)

    @property
    def has_result(self) -> bool:
        """Whether `result` has resolved."""
        return self._result.done()

    @property
    def state(self) -> str:
        """The name of the fetch's state, for people."""
        return self._machine.state.value

    @property
    def quarantined(self) -> list[int]:
        """Reserved blocks of a failed fetch that a late byte may still reach."""
        return self._machine.quarantined

    def abort(self, reason: str) -> None:
        """End the fetch; nothing happens once it has a result."""
        self.handle(AbortOrdered(reason))

    async def leftovers(self) -> list[int]:
        """Wait until an aborted fetch is quiesced; the reserved blocks that its caller must free.

        Also right where the fetch had succeeded in the very moment of the abort, and nobody took its blocks.
        """
        block_ids = await self.quiesced
        result = await self.result
        return result.block_ids if result.ok else block_ids

    def handle(self, event: FetchEvent) -> None:
        """Feed the machine and do what it says."""
        self._actions += self._machine.handle(event, self._tools.clock())
        self._alarm.set(self._machine.next_deadline)
        if self._carrying_out:
            return  # an action has led to this event at once: its actions come after those that are due already
        self._carrying_out = True
        try:
            while self._actions:
                self._carry_out(self._actions.popleft())
        finally:
            self._carrying_out = False

    def _carry_out(self, action: FetchAction) -> None:
        match action:
            case SendMessage(message):
                self._session.send(message)
            case Reserve(num_blocks):
                self._tools.start_task(self._ask_for_room(num_blocks))
            case StartRead():
                self._session.start_read(self, action)
            case Verify():
                self._verify(action)
            case AbortReads(reason):
                self._session.connection.close(reason)  # the session's teardown aborts the link
            case Resolve(result):
                self._tools.observer.fetch_ended(
                    self._session.peer.peer_id, result, self._tools.clock() - self._ordered_at
                )
                self._result.set_result(result)
            case Quiesced(block_ids):
                self._session.fetches.pop(self.transfer_id, None)
                self._quiesced.set_result(block_ids)

    def _log(self, level: int, what: str, error: BaseException) -> None:
        self._context.run(logger.log, level, "transfer %s: %s", self.transfer_id.hex(), what, exc_info=error)

    async def _ask_for_room(self, num_blocks: int) -> None:
        try:
            reservation = await self._reserve(num_blocks)
        except asyncio.CancelledError:
            self.handle(ReserveFailed("the exchange is closing"))
            raise
        except KVStoreError as error:
            self.handle(ReserveFailed(str(error)))
        except Exception as error:
            # The caller's function: whatever it raises ends this fetch, visibly, and nothing else.
            self._log(logging.ERROR, "reserving failed", error)
            self.handle(ReserveFailed(repr(error)))
        else:
            self.handle(Reserved(reservation))

    def read(self, read_id: int, runs: list[Run]) -> None:
        """Start a read on the link."""
        num_blocks, started_at = sum(run.num_blocks for run in runs), self._tools.clock()
        reading: asyncio.Future[None]
        try:
            reading = self._session.link.read(read_id, runs)
        except Exception as error:
            # Whatever a transport raises instead of returning a future: the read has ended, and badly.
            reading = asyncio.get_running_loop().create_future()
            reading.set_exception(error)
        reading.add_done_callback(lambda done: self._read_ended(read_id, num_blocks, started_at, done))

    def _read_ended(self, read_id: int, num_blocks: int, started_at: float, done: asyncio.Future[None]) -> None:
        error, tools, session = done.exception(), self._tools, self._session
        num_bytes = num_blocks * tools.memory.block_bytes
        duration_s = tools.clock() - started_at
        tools.observer.read_ended(
            session.peer.peer_id, session.link.lane, num_blocks, num_bytes, duration_s, error is None
        )
        if error is None:
            self.handle(ReadEnded(read_id))
            return
        if not isinstance(error, ReadFailed):
            self._log(logging.ERROR, "a read broke", error)
        self.handle(ReadEnded(read_id, FetchCause.READ_FAILED, str(error)))
        # What else is half done on this link cannot be trusted to end well: start afresh.
        session.connection.close(f"a read failed: {error}")

    def _verify(self, action: Verify) -> None:
        tools, read_id = self._tools, action.read_id
        tools.observer.digests_checked(self._session.peer.peer_id, len(action.local_ids))
        job = functools.partial(find_wrong, tools.memory, action.local_ids, action.proofs)
        if len(action.local_ids) * tools.memory.block_bytes <= _MAX_INLINE_BYTES and tools.memory.device == "cpu":
            self.handle(Verified(read_id, job()))
            return
        verifying = asyncio.get_running_loop().run_in_executor(tools.digest_executor, job)
        verifying.add_done_callback(lambda done: self._verification_ended(read_id, done))

    def _verification_ended(self, read_id: int, done: asyncio.Future[list[int]]) -> None:
        if done.cancelled():
            self.handle(Verified(read_id, None, "the exchange is closing"))
        elif (error := done.exception()) is not None:
            self._log(logging.ERROR, "verifying blocks failed", error)
            self.handle(Verified(read_id, None, repr(error)))
        else:
            self.handle(Verified(read_id, done.result()))
