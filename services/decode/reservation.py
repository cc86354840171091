"""The engine's grant of blocks for one attempt of a handoff, as something to await and to cancel."""

from __future__ import annotations

import asyncio

from kvstore.errors import KVStoreError
from kvstore.protocol import Reservation
from services.engine.api import EngineError, Request
from services.worker.assembly import WorkerParts


class ReservationWithdrawn(KVStoreError):
    """The engine granted no room, and will not any more."""


class PendingReservation:
    """One attempt's."""

    def __init__(self, parts: WorkerParts, request: Request) -> None:
        self.request = request
        self._parts = parts
        self._loop = asyncio.get_running_loop()
        self._granted: asyncio.Future[Reservation] = self._loop.create_future()
        self._cancelled = False

    async def reserve(self, num_blocks: int) -> Reservation:
        """Wait for room. Raises ReservationWithdrawn after `cancel` or a refusal, then having taken no block."""
        if self._cancelled:
            raise ReservationWithdrawn("the fetch was abandoned before it asked for room")
        try:
            await self._parts.thread.call(self._parts.engine.reserve, self.request, self._on_granted)
        except EngineError as error:
            raise ReservationWithdrawn(str(error)) from error
        return await self._granted

    def _on_granted(self, reservation: Reservation) -> None:  # engine thread
        self._loop.call_soon_threadsafe(self._grant, reservation)

    def _grant(self, reservation: Reservation) -> None:
        if self._granted.done():  # the exchange has closed meanwhile: nobody waits for these blocks
            self._parts.thread.post(self._parts.engine.release_reservation, self.request, reservation.block_ids)
        else:
            self._granted.set_result(reservation)

    async def cancel(self) -> None:
        """Give up waiting. A reservation granted before stands, and its blocks are the fetch's to give back."""
        self._cancelled = True
        withdrawn = await self._parts.thread.call(self._parts.engine.cancel_reservation, self.request)
        if withdrawn and not self._granted.done():  # else the exchange has closed, which ended whoever waited
            self._granted.set_exception(ReservationWithdrawn("the fetch was abandoned"))
