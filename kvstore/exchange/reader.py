"""Fetches blocks: asks for room, reads over the link, checks them against their proofs."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.block import Run
from kvstore.errors import KVStoreError, ReadFailed
from kvstore.exchange.connection import Connection
from kvstore.protocol import (
    AbortOrdered,
    Action,
    FetchCause,
    FetchEvent,
    FetchMachine,
    FetchResult,
    Quiesced,
    Read,
    ReadEnded,
    ReaderSession,
    Reservation,
    Reserve,
    Reserved,
    ReserveFailed,
    Resolve,
    Verified,
    Verify,
)

logger = logging.getLogger(__name__)

# Below this, verifying in the loop is quicker than handing it to a thread (measured: 15 GB/s against 0.1 ms).
_MAX_INLINE_BYTES: Final = 512 * 1024
# Above this, one thread had better verify while the transport's reads on: a cache holds no more at best, and the other
# reads of that thread wait meanwhile.
_MAX_LANDED_BYTES: Final = 16 * 1024 * 1024

ReserveFunction = Callable[[int], Awaitable[Reservation]]
"""Finds room for so many blocks."""


@dataclass(frozen=True)
class _Check:
    """Blocks of one read held against their proofs, in any thread."""

    num_bytes: int
    find_wrong: Callable[[], list[int]]


@dataclass(frozen=True)
class _Landed:
    """When a read had ended, and which of its blocks were wrong then."""

    at: float
    wrong: list[int]


class Fetch:
    """One transfer, as its reader sees it: `result` first, `quiesced` then or later. Both always resolve."""

    def __init__(self, connection: Connection[ReaderSession], machine: FetchMachine, reserve: ReserveFunction) -> None:
        loop = asyncio.get_running_loop()
        self.transfer_id = machine.transfer_id
        self._context = contextvars.copy_context()  # what is logged of a transfer names the request that began it
        self._connection = connection
        self._tools = connection.tools
        self.machine = machine
        self._reserve = reserve
        self._ordered_at = self._tools.clock()
        self._landed: dict[int, _Landed] = {}  # by read: what the transport's thread has verified already
        self._result: asyncio.Future[FetchResult] = loop.create_future()
        self._quiesced: asyncio.Future[list[int]] = loop.create_future()
        connection.handles[self.transfer_id] = self

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

    over = quiesced

    @property
    def num_announced(self) -> int:
        """How many blocks the owner has said that it has."""
        return self.machine.num_announced

    def describe(self) -> dict[str, object]:
        """Return the state, as plain values."""
        return {
            "transfer_id": self.transfer_id.hex(),
            "owner": self._connection.peer.peer_id,
            "state": self.machine.state.value,
            "quarantined_blocks": self.machine.quarantined,
        }

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
        """Tell the machine, and do what it says."""
        self._connection.do(self._connection.session.tell(self.transfer_id, event, self._tools.clock()))

    def carry_out(self, action: Action) -> None:
        """Do one of the orders that the machine gives; each is answered by an event."""
        match action:
            case Reserve(num_blocks):
                self._tools.start_task(self._ask_for_room(num_blocks))
            case Read(read_id, runs):
                num_blocks, started_at = sum(run.num_blocks for run in runs), self._tools.clock()
                reading = begin(lambda: self._read(read_id, runs))
                reading.add_done_callback(lambda done: self._read_ended(read_id, num_blocks, started_at, done))
            case Verify():
                self._verify(action)
            case Resolve(result):
                for read_id in self.machine.reads:
                    self._connection.reads.drop(read_id)  # whatever becomes of them, nobody waits
                duration_s = self._tools.clock() - self._ordered_at
                self._tools.observer.fetch_ended(self._connection.peer.peer_id, result, duration_s)
                self._result.set_result(result)
            case Quiesced(block_ids):
                del self._connection.handles[self.transfer_id]
                self._quiesced.set_result(block_ids)

    def _log_error(self, what: str, error: BaseException) -> None:
        self._context.run(logger.error, "transfer %s: %s", self.transfer_id.hex(), what, exc_info=error)

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
            self._log_error("reserving failed", error)
            self.handle(ReserveFailed(repr(error)))
        else:
            self.handle(Reserved(reservation))

    def _read(self, read_id: int, runs: Sequence[Run]) -> asyncio.Future[None]:
        self._connection.reads.begin(read_id, runs)
        return self._connection.link.read(read_id, runs, self._when_landed(read_id))

    def _when_landed(self, read_id: int) -> Callable[[], None] | None:
        """What the transport's thread may do as soon as the bytes are there: that spares two others their turns."""
        check = self._check_of(self.machine.verification(read_id))
        if check is None or check.num_bytes > _MAX_LANDED_BYTES or self._tools.memory.device != "cpu":
            return None

        def verify() -> None:
            landed_at = self._tools.clock()
            with contextlib.suppress(Exception):  # it will fail again where that is seen
                self._landed[read_id] = _Landed(landed_at, check.find_wrong())

        return verify

    def _read_ended(self, read_id: int, num_blocks: int, started_at: float, done: asyncio.Future[None]) -> None:
        error, tools, connection = done.exception(), self._tools, self._connection
        connection.reads.end(read_id)
        landed_at = self._landed[read_id].at if read_id in self._landed else tools.clock()
        num_bytes, duration_s = num_blocks * tools.memory.block_bytes, landed_at - started_at
        tools.observer.read_ended(
            connection.peer.peer_id, connection.link.lane, num_blocks, num_bytes, duration_s, error is None
        )
        if error is None:
            self.handle(ReadEnded(read_id))
            return
        if not isinstance(error, ReadFailed):
            self._log_error("a read broke", error)
        self.handle(ReadEnded(read_id, FetchCause.READ_FAILED, str(error)))
        # What else is half done on this link cannot be trusted to end well: start afresh.
        connection.close(f"a read failed: {error}")

    def _verify(self, action: Verify) -> None:
        tools, check = self._tools, self._check_of(action)
        if check is None:
            self.handle(Verified(action.read_id, []))  # whoever reads it from us will see
            return
        tools.observer.digests_checked(self._connection.peer.peer_id, len(action.local_ids))
        if (landed := self._landed.pop(action.read_id, None)) is not None:
            self.handle(Verified(action.read_id, landed.wrong))
            return
        if check.num_bytes <= _MAX_INLINE_BYTES and tools.memory.device == "cpu":
            self.handle(Verified(action.read_id, check.find_wrong()))
            return
        verifying = asyncio.get_running_loop().run_in_executor(tools.verifier, check.find_wrong)
        verifying.add_done_callback(lambda done: self._verification_ended(action.read_id, done))

    def _check_of(self, action: Verify) -> _Check | None:
        """None where we have no key."""
        key, memory = self._tools.proof_key, self._tools.memory
        if key is None:
            return None
        find_wrong = functools.partial(key.find_wrong, memory, action.local_ids, action.subjects, action.proofs)
        return _Check(len(action.local_ids) * memory.block_bytes, find_wrong)

    def _verification_ended(self, read_id: int, done: asyncio.Future[list[int]]) -> None:
        if done.cancelled():
            self.handle(Verified(read_id, None, "the exchange is closing"))
        elif (error := done.exception()) is not None:
            self._log_error("verifying blocks failed", error)
            self.handle(Verified(read_id, None, repr(error)))
        else:
            self.handle(Verified(read_id, done.result()))


def begin(start: Callable[[], asyncio.Future[None]]) -> asyncio.Future[None]:
    """Start a read or a send. Whatever a transport raises instead of returning a future: it has ended, and badly."""
    try:
        return start()
    except Exception as error:
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        failed.set_exception(error)
        return failed
