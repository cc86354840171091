"""Reports the block protocol to the metrics. Each method runs in the event loop and must return at once."""

from __future__ import annotations

from kvstore.protocol import FetchResult, LeaseOutcome


class ExchangeObserver:
    """Hears of everything and does nothing; override what you count."""

    def peer_connected(self, peer_id: str, transport: str, lane: str, we_read: bool) -> None:
        """A connection is usable. `we_read`: we dialled it and read over it; otherwise the peer reads from us."""

    def peer_refused(self, peer: str, reason: str) -> None:
        """A peer (its id, or its address where it gave none) was incompatible."""

    def peer_unproven(self, address: str, reason: str) -> None:
        """Somebody who has dialled us has not proven to be a peer."""

    def peer_lost(self, peer_id: str, reason: str, we_read: bool) -> None:
        """A connection has ended."""

    def read_ended(self, peer_id: str, lane: str, num_blocks: int, num_bytes: int, duration_s: float, ok: bool) -> None:
        """One read has ended; `duration_s` counts from asking for it."""

    def digests_checked(self, peer_id: str, num_blocks: int) -> None:
        """The digests of so many blocks were computed and are being compared."""

    def fetch_ended(self, peer_id: str, result: FetchResult, duration_s: float) -> None:
        """A fetch has its result; `duration_s` counts from its order."""

    def lease_ended(self, peer_id: str, outcome: LeaseOutcome, num_blocks: int, duration_s: float) -> None:
        """A lease has closed and its blocks are free."""
