"""Writes the prefix index, one writer per process that holds blocks.

A task writes noted changes in batches, so nothing here waits for Redis. Redis takes a batch only after the one before
it. Whatever went wrong (Redis was flushed, restored from an old dump, failed over to a stale replica, or took us for
dead) shows as a number that does not fit; the writer then announces everything anew under another slot.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import redis.asyncio
from redis.exceptions import MovedError, ResponseError

from kvstore.block import BlockHash
from kvstore.errors import RegistryError
from kvstore.index.entries import KEY_BYTES, PendingChanges, Tier, encode_snapshot
from kvstore.index.scripts import CLAIM, WITHDRAW, WRITE
from kvstore.index.session import IndexObserver, IndexSession, ResyncReason, pace_s
from kvstore.registry import REDIS_FAILURES, ConnectionState, describe, open_client

logger = logging.getLogger(__name__)

Snapshot = Iterable[tuple[BlockHash, Tier]]

_CHANGE_BYTES = KEY_BYTES + 1
_MIN_LEASE_S = 0.05
_SNAPSHOT_TIMEOUT_S = 10.0
_MAX_RETRY_S = 0.5  # until a slot that could not be had is asked for again: our registration may be on its way


class _SnapshotFailed(Exception):
    """The blocks' owner could not say what it holds. Caught here: it must not end the lease's renewal for good."""


@dataclass
class _Claim:
    """Our slot, what Redis has written down about it, and the number of the last batch that it took."""

    slot: int
    record: bytes
    seq: int = 0


class IndexWriter(IndexSession):
    """Tells the index which blocks this process holds, for as long as it is not closed.

    `snapshot` gives every block that the process holds, once per tier; or an awaitable of that, where another thread
    owns the blocks. It is called at the start and whenever Redis lost something, and read in slices between turns of
    the event loop: changes must not disturb it. Those that it does not show must be told by `added` and `removed`.

    Only who is registered under its id and incarnation gets in (`Registrar`): of two processes with one id the newer
    writes, the other waits until the registry has it. What we wrote is forgotten when our lease there ends.
    """

    def __init__(
        self,
        redis_url: str,
        holder_id: str,
        incarnation: str,
        snapshot: Callable[[], Snapshot | Awaitable[Snapshot]],
        *,
        lease_s: float = 5.0,
        flush_s: float = 0.05,
        max_batch: int = 256,
        max_pending: int = 65_536,
        prefix: str = "tandem",
        timeout_s: float = 1.0,
        observer: IndexObserver | None = None,
    ) -> None:
        """`lease_s` is the registry's: that Redis forgot us is noticed within a third of it. Raises RegistryError."""
        if not holder_id or not incarnation or any(character.isspace() for character in incarnation):
            raise RegistryError(f"no fit names of a holder and its incarnation: {holder_id!r}, {incarnation!r}")
        if lease_s < _MIN_LEASE_S or flush_s < 0:
            raise RegistryError(f"{holder_id}: lease of {lease_s} s (least: {_MIN_LEASE_S}), flush after {flush_s} s")
        if max_batch < 1 or max_pending < 1:
            raise RegistryError(f"{holder_id}: batch {max_batch}, pending {max_pending}")
        super().__init__(redis_url, f"prefix index of {holder_id}", prefix, lease_s / 3, timeout_s)
        self._holder_id = holder_id
        self._incarnation = incarnation
        self._snapshot = snapshot
        self._lease_s = lease_s
        self._flush_s = flush_s
        self._max_batch = max_batch
        self._observer = observer or IndexObserver()
        self._pending = PendingChanges(max_pending)
        self._in_flight = b""  # changes that Redis may or may not have taken
        self._has_pending = asyncio.Event()
        self._overflowed = False
        self._claim: _Claim | None = None
        self._num_claims = 0
        self._resync_reason: ResyncReason | None = ResyncReason.START
        self.superseded_by: str | None = None
        """The other incarnation that the registry has under our id; until it goes nothing of ours is in the index."""
        self._next_check_s = time.monotonic()

    @property
    def synced(self) -> bool:
        """Whether Redis has taken everything that we reported. For tests and /debug/state."""
        is_told = self._resync_reason is None and not self._overflowed
        return self.connected and is_told and not self._pending and not self._in_flight

    @property
    def num_pending(self) -> int:
        """Number of blocks with a change that is not written yet."""
        return len(self._pending) + len(self._in_flight) // _CHANGE_BYTES

    def added(self, hashes: Sequence[BlockHash], tier: Tier) -> None:
        """Note that the blocks can be had from `tier` now. Call it in the event loop; it returns at once."""
        self._note(self._pending.add(hashes, tier))

    def removed(self, hashes: Sequence[BlockHash], tier: Tier) -> None:
        """Note that the blocks are in `tier` no more. Call it in the event loop; it returns at once."""
        self._note(self._pending.remove(hashes, tier))

    async def close(self) -> None:
        """Stop, and take our blocks out of every lookup. With Redis away our lease in the registry simply runs out."""
        await super().close()
        claim, self._claim = self._claim, None
        if claim is None:
            return
        try:
            async with open_client(self._redis_url, self._timeout_s) as client:
                await self._at_home(client, lambda home: self._call(home, WITHDRAW, claim.slot, claim.record))
        except REDIS_FAILURES as error:
            logger.warning("%s: could not withdraw, so our lease must run out: %s", self._name, describe(error))

    def _note(self, fits: bool) -> None:
        if not fits:
            self._overflowed = True
        self._has_pending.set()

    async def _session(self, client: redis.asyncio.Redis) -> None:
        self._next_check_s = time.monotonic()  # at once: Redis may have come back empty
        try:
            while True:
                if self._overflowed and self._resync_reason is None:
                    self._resync_reason = ResyncReason.OVERFLOW
                if self._resync_reason is not None:
                    if not await self._resync(client, self._resync_reason):
                        await asyncio.sleep(min(self._lease_s / 10, _MAX_RETRY_S))
                    continue
                await self._sweep_if_due(client)
                if await self._wait_for_pending(min(self._next_check_s, self._next_sweep_s)):
                    await self._flush(client)
                elif time.monotonic() >= self._next_check_s:
                    await self._send(client, b"")
        except MovedError:
            raise
        except Exception as error:
            if isinstance(error, ResponseError) or not isinstance(error, REDIS_FAILURES):
                # Retrying the same would be refused, or go wrong, again; a new claim repairs what it can.
                self._resync_reason = ResyncReason.ERROR
            raise

    async def _wait_for_pending(self, deadline_s: float) -> bool:
        """Return whether there is something to write: `flush_s` after it came, so that more can join, or when due."""
        if not self._pending and not self._in_flight:
            self._has_pending.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, deadline_s - time.monotonic())):
                    await self._has_pending.wait()
                    await asyncio.sleep(self._flush_s)
        return bool(self._pending or self._in_flight)

    async def _flush(self, client: redis.asyncio.Redis) -> None:
        """Write one batch: the one that was in flight when the connection broke, or a new one."""
        if not self._in_flight:
            self._in_flight = self._pending.take(self._max_batch)
        start_s = time.monotonic()
        if await self._send(client, self._in_flight):
            self._in_flight = b""
            if self._pending:
                await asyncio.sleep(pace_s(time.monotonic() - start_s))

    async def _send(self, client: redis.asyncio.Redis, changes: bytes) -> bool:
        """Write changes; without any, ask whether those before are there. False: Redis lost track of us."""
        claim = self._claim
        assert claim is not None, "a batch without a slot"
        seq = claim.seq + 1 if changes else claim.seq
        start_s = time.monotonic()
        if await self._call(client, WRITE, claim.slot, claim.record, seq, changes) == 0:
            self._resync_reason = ResyncReason.LOST
            return False
        claim.seq = seq
        self._next_check_s = start_s + self._lease_s / 3
        self._set_state(ConnectionState.CONNECTED)
        if changes:
            self._observer.batch_written(len(changes) // _CHANGE_BYTES, time.monotonic() - start_s)
        return True

    async def _resync(self, client: redis.asyncio.Redis, reason: ResyncReason) -> bool:
        """Take a new slot and announce everything. False: not now, try again in a while."""
        self._num_claims += 1
        names = (self._holder_id, self._incarnation, self._token, self._num_claims)
        reply = cast("list[int | bytes]", await self._call(client, CLAIM, *names))
        self._set_state(ConnectionState.CONNECTED)
        slot = cast("int", reply[0])
        # Registered is nobody: we are not yet, or Redis has just forgotten it.
        self._note_rival((cast("bytes", reply[1]).decode(errors="replace") or None) if slot == 0 else None)
        if slot <= 0:
            if slot < 0:
                logger.error("%s: the index has no slot for another holder, trying again", self._name)
            return False
        record = f"{self._token}.{self._num_claims} {self._incarnation} {self._holder_id}".encode()
        self._claim = _Claim(slot, record)
        if reason is not ResyncReason.START:
            logger.warning("%s: announcing everything anew (%s)", self._name, reason.value)
        self._observer.resync_started(reason)
        # From here on changes are kept, to be written after the snapshot; older ones are part of it.
        start_s = time.monotonic()
        self._pending.clear()
        self._in_flight = b""
        self._overflowed = False
        num_blocks = await self._announce(client)
        if num_blocks is None:
            return False
        self._resync_reason = None
        self._observer.resync_ended(reason, num_blocks, time.monotonic() - start_s)
        return True

    async def _announce(self, client: redis.asyncio.Redis) -> int | None:
        """Write the snapshot and return its size; None if it could not be had or was overtaken."""
        try:
            blocks = await self._read_snapshot()
            num_blocks = 0
            while changes := self._next_changes(blocks):
                start_s = time.monotonic()
                if not await self._send(client, changes) or self._overflowed:
                    return None
                num_blocks += len(changes) // _CHANGE_BYTES
                await asyncio.sleep(pace_s(time.monotonic() - start_s))
            return num_blocks
        except _SnapshotFailed:
            logger.exception("%s: no snapshot of our blocks, trying again", self._name)
            return None

    async def _read_snapshot(self) -> Iterator[tuple[BlockHash, Tier]]:
        try:
            taken = self._snapshot()
            if isinstance(taken, Awaitable):
                async with asyncio.timeout(_SNAPSHOT_TIMEOUT_S):
                    taken = await taken
            return iter(taken)
        except Exception as error:
            raise _SnapshotFailed from error

    def _next_changes(self, blocks: Iterator[tuple[BlockHash, Tier]]) -> bytes:
        try:
            return encode_snapshot(itertools.islice(blocks, self._max_batch))
        except Exception as error:
            raise _SnapshotFailed from error

    def _note_rival(self, incarnation: str | None) -> None:
        if incarnation == self.superseded_by:
            return
        if incarnation is not None:
            text = "%s: another process (incarnation %s, ours %s) has this id, so our blocks are not in the index"
            logger.error(text, self._name, incarnation, self._incarnation)
        else:
            logger.warning("%s: the id is ours again", self._name)
        self.superseded_by = incarnation
