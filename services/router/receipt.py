"""Says where a sequence's KV came from and where its time went, from the worker's usage and stamps alone.

The counters of the same names (metrics.py) are fed from receipts, so the two always add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tandem.v1 import worker_pb2 as pb

from services.lifecycle import Event

_STAGES = {
    "tokenize": (Event.ARRIVED, Event.TOKENIZED),
    "admit_and_route": (Event.TOKENIZED, Event.ROUTED),
    "order": (Event.ROUTED, Event.RECEIVED),
    # The order's way to the prefill worker, and what that fetches before it queues the prompt.
    "prefill_order": (Event.PREFILL_ORDERED, Event.PREFILL_QUEUED),
    "prefill_queue": (Event.PREFILL_QUEUED, Event.PREFILL_SCHEDULED),
    "prefill": (Event.PREFILL_SCHEDULED, Event.PREFILL_FINISHED),
    "handoff": (Event.PREFILL_FINISHED, Event.HANDOFF_CONFIRMED),
    "join": (Event.HANDOFF_CONFIRMED, Event.DECODE_JOINED),
    "decode": (Event.FIRST_TOKEN, Event.FINISHED),
}


@dataclass(frozen=True)
class Fetched:
    """A part of the prefix that was pulled from a holder."""

    holder_id: str
    tier: str
    lane: str
    num_blocks: int
    num_bytes: int
    seconds: float

    def to_json(self) -> dict[str, object]:
        return {
            "holder_id": self.holder_id,
            "tier": self.tier,
            "lane": self.lane,
            "blocks": self.num_blocks,
            "bytes": self.num_bytes,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Receipt:
    """One sequence that ended regularly. num_computed + num_reused + num_fetched tokens are the prompt's."""

    index: int
    decode_worker_id: str
    prefill_worker_id: str
    """The decode worker itself after a local prefill."""
    num_attempts: int
    """Decode workers that it was given to."""
    num_recomputes: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_computed_tokens: int
    num_reused_tokens: int
    """Found in the prefilling worker's own cache."""
    num_fetched_tokens: int
    fetched: tuple[Fetched, ...]
    num_handoff_blocks: int
    num_handoff_bytes: int
    unix_s: Mapping[Event, float]
    total_s: float
    """From the request's arrival to the sequence's last token, both at the router."""

    @property
    def prefilled_locally(self) -> bool:
        return self.prefill_worker_id == self.decode_worker_id

    @property
    def num_cached_tokens(self) -> int:
        return self.num_reused_tokens + self.num_fetched_tokens

    @property
    def num_fetched_blocks(self) -> int:
        return sum(part.num_blocks for part in self.fetched)

    @property
    def num_digests_checked(self) -> int:
        """One per block that was read from another process."""
        return self.num_handoff_blocks + self.num_fetched_blocks

    def seconds_between(self, start: Event, end: Event) -> float | None:
        """None where one of them is not known. Clocks of two machines may differ; time never runs backwards."""
        if start not in self.unix_s or end not in self.unix_s:
            return None
        return max(self.unix_s[end] - self.unix_s[start], 0.0)

    def to_json(self) -> dict[str, object]:
        stages = {name: self.seconds_between(*events) for name, events in _STAGES.items()}
        return {
            "index": self.index,
            "decode_worker_id": self.decode_worker_id,
            "prefill_worker_id": self.prefill_worker_id,
            "prefilled_locally": self.prefilled_locally,
            "attempts": self.num_attempts,
            "recomputes": self.num_recomputes,
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_generated_tokens,
            "computed_tokens": self.num_computed_tokens,
            "reused_tokens": self.num_reused_tokens,
            "fetched_tokens": self.num_fetched_tokens,
            "fetched": [part.to_json() for part in self.fetched],
            "handoff": {"blocks": self.num_handoff_blocks, "bytes": self.num_handoff_bytes},
            "digests_checked": self.num_digests_checked,
            "stage_seconds": {
                **{name: seconds for name, seconds in stages.items() if seconds is not None},
                "total": self.total_s,
            },
            "unix_seconds": {event.name.lower(): unix_s for event, unix_s in sorted(self.unix_s.items())},
        }


def make_receipt(
    index: int,
    usage: pb.Usage,
    stamps: Iterable[pb.Stamp],
    router_unix_s: Mapping[Event, float],
    *,
    decode_worker_id: str,
    block_size: int,
    num_attempts: int,
    num_generated_tokens: int,
) -> Receipt:
    """`router_unix_s`: the sequence's timeline at the router, from ARRIVED to FINISHED. Where the workers have stamped
    the same event theirs counts, so that stages are measured by one clock; there are no `stamps` where a stop string
    ended the sequence before the worker did."""
    fetched = tuple(
        Fetched(part.holder_id, part.tier, part.lane, part.num_blocks, part.num_bytes, part.seconds)
        for part in usage.fetched
    )
    num_cached = min(usage.num_cached_tokens, usage.num_prompt_tokens)
    # The last token of a prompt is always computed, even where its block is there.
    num_fetched = min(sum(part.num_blocks for part in fetched) * block_size, num_cached)
    known = {int(event) for event in Event}
    unix_s = dict(router_unix_s) | {Event(stamp.event): stamp.unix_s for stamp in stamps if stamp.event in known}
    return Receipt(
        index=index,
        decode_worker_id=decode_worker_id,
        prefill_worker_id=decode_worker_id if usage.prefilled_locally else usage.prefill_worker_id,
        num_attempts=num_attempts,
        num_recomputes=usage.num_recomputes,
        num_prompt_tokens=usage.num_prompt_tokens,
        num_generated_tokens=num_generated_tokens,
        num_computed_tokens=usage.num_prompt_tokens - num_cached,
        num_reused_tokens=num_cached - num_fetched,
        num_fetched_tokens=num_fetched,
        fetched=fetched,
        num_handoff_blocks=usage.num_transferred_blocks,
        num_handoff_bytes=usage.num_transferred_bytes,
        unix_s=unix_s,
        total_s=max(router_unix_s[Event.FINISHED] - router_unix_s[Event.ARRIVED], 0.0),
    )
