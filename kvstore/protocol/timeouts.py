"""Names every deadline of the block protocol, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class ExchangeTimeouts:
    """The deadlines of one worker. Both ends of a connection should use the same heartbeat and peer timeout."""

    heartbeat_s: float = 0.5
    """Interval of heartbeats, both ways."""
    peer_timeout_s: float = 2.0
    """A peer from which no complete message has come for so long is lost; so is one whose link has brought no byte of a
    read for so long."""
    connect_s: float = 10.0
    """From dialling to a usable connection, handshake and transport link included. Who has not proven itself after
    `peer_timeout_s` is not waited for that long."""
    close_s: float = 5.0
    """Until a closing exchange stops waiting for its callers' reservations."""

    lease_ttl_s: float = 10.0
    """Owner: a lease that is not renewed for so long is over."""
    lease_max_s: float = 600.0
    """Owner: no lease lives longer, renewed or not."""

    offer_s: float = 60.0
    """Reader: from the order to the Offer; includes the prompt's time in the prefill worker's queue."""
    reserve_s: float = 60.0
    """Reader: from the Offer until its own room is reserved."""
    announce_s: float = 60.0
    """Reader: from one announcement to the next; includes computing a chunk."""
    read_s: float = 10.0
    """Reader: one read, from the last byte that came over its link to its verified digests. Where the link is seen to
    stand still, `peer_timeout_s` ends it before."""
    confirm_s: float = 5.0
    """Reader: from Confirm to its answer."""
    drain_s: float = 10.0
    """Both: how long a read or send may go on after its transfer has ended before its link is aborted."""

    def with_stages_of(self, stage_s: float) -> ExchangeTimeouts:
        """Return the same deadlines, with one for every stage of a fetch and for each of its reads."""
        return replace(self, offer_s=stage_s, reserve_s=stage_s, announce_s=stage_s, read_s=stage_s, confirm_s=stage_s)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name} must be positive, not {value!r}")
        if self.peer_timeout_s <= self.heartbeat_s or self.lease_ttl_s <= self.heartbeat_s:
            raise ValueError(
                f"peer_timeout_s ({self.peer_timeout_s}) and lease_ttl_s ({self.lease_ttl_s}) must exceed "
                f"heartbeat_s ({self.heartbeat_s})"
            )
