"""Says where a sequence's KV came from and where its time went, from the worker's usage and stamps alone.

The counters of the same names (metrics.py) are fed from receipts, so the two always add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tandem.v1 import worker_pb2 as pb

from services.budgets import Objectives
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
_STEP_ALIGNMENT = (Event.DECODE_JOINED, Event.FIRST_TOKEN)


_NO_OBJECTIVES = Objectives()


@dataclass
class Resume:
    """A pause in a sequence: its worker was lost or gave it up after some tokens, and another one went on."""

    worker_id: str
    """Who was lost."""
    reason: str
    """lost, silent, given_up, moved"""
    num_carried_tokens: int
    """What it had said, which nobody sampled again."""
    block_size: int
    since_s: float
    """When the last of these tokens had come; any clock."""
    pause_s: float | None = None
    """From then to the next token; None: it has not come."""
    usage: pb.Usage | None = None
    """What the worker that went on said of prompt and carried tokens."""
    num_repeated_tokens: int = 0
    """Of the carried ones, those that it had to say again, since it is of an older version."""
    is_exact: bool = False
    """Whether all who went on compute as the first worker did: else the tokens may differ from what it would have
    said."""

    @property
    def num_cached_tokens(self) -> int:
        return 0 if self.usage is None else min(self.usage.num_cached_tokens, self.usage.num_prompt_tokens)

    @property
    def num_recomputed_tokens(self) -> int:
        """Of prompt and carried tokens; one at least, whose logits are wanted."""
        num_computed = 0 if self.usage is None else self.usage.num_prompt_tokens - self.num_cached_tokens
        return num_computed + self.num_repeated_tokens

    @property
    def num_fetched_tokens(self) -> int:
        num_blocks = 0 if self.usage is None else sum(part.num_blocks for part in self.usage.fetched)
        return min(num_blocks * self.block_size, self.num_cached_tokens)

    @property
    def num_moved_tokens(self) -> int:
        """All, where their KV came from the worker before: nothing was looked up or computed then."""
        return self.num_cached_tokens if self.usage is not None and self.usage.HasField("moved") else 0

    @property
    def num_reused_tokens(self) -> int:
        return self.num_cached_tokens - self.num_fetched_tokens - self.num_moved_tokens

    def to_json(self) -> dict[str, object]:
        return {
            "worker_id": self.worker_id,
            "reason": self.reason,
            "pause_seconds": self.pause_s,
            "carried_tokens": self.num_carried_tokens,
            "recomputed_tokens": self.num_recomputed_tokens,
            "reused_tokens": self.num_reused_tokens,
            "fetched_tokens": self.num_fetched_tokens,
            "moved_tokens": self.num_moved_tokens,
            "moved": _part_to_json(self.usage.moved) if self.usage and self.usage.HasField("moved") else None,
            "exact": self.is_exact,
        }


@dataclass(frozen=True)
class Receipt:
    """One sequence that ended regularly. num_computed + num_reused + num_fetched tokens are the prompt's."""

    index: int
    usage: pb.Usage
    """As the worker reported it: of a resumed sequence the first one, but for recomputes, which are all."""
    decode_worker_id: str
    """Who ended it."""
    numerics: str
    """Names the arithmetic of the decode worker; empty: it said none."""
    block_size: int
    num_attempts: int
    """Decode workers that it was given to."""
    num_generated_tokens: int
    unix_s: Mapping[Event, float]
    is_simulation: bool
    """A worker simulated it: its tokens mean nothing."""
    total_s: float
    """From the request's arrival to the sequence's last token, both at the router."""
    resumes: tuple[Resume, ...] = ()
    objectives: Objectives = _NO_OBJECTIVES
    """What its client was to get."""
    deflected: str = ""
    """What was done where the workers' roles had another place for it: `prompt` or `answer`; empty: nothing."""

    @property
    def first_decode_worker_id(self) -> str:
        return self.resumes[0].worker_id if self.resumes else self.decode_worker_id

    @property
    def prefill_worker_id(self) -> str:
        """The decode worker itself after a local prefill."""
        return self.first_decode_worker_id if self.usage.prefilled_locally else self.usage.prefill_worker_id

    @property
    def num_cached_tokens(self) -> int:
        return min(self.usage.num_cached_tokens, self.usage.num_prompt_tokens)

    @property
    def num_computed_tokens(self) -> int:
        return self.usage.num_prompt_tokens - self.num_cached_tokens

    @property
    def num_fetched_tokens(self) -> int:
        # The last token of a prompt is always computed, even where its block is there.
        return min(self._num_fetched_blocks * self.block_size, self.num_cached_tokens)

    @property
    def num_reused_tokens(self) -> int:
        """Found in the prefilling worker's own cache."""
        return self.num_cached_tokens - self.num_fetched_tokens

    @property
    def _num_fetched_blocks(self) -> int:
        return sum(part.num_blocks for part in self.usage.fetched)

    @property
    def num_digests_checked(self) -> int:
        """Return the number of blocks read from other processes: one digest each."""
        return self.usage.num_transferred_blocks + self._num_fetched_blocks

    @property
    def resumed_elsewhere(self) -> str | None:
        """Whether the tokens are for certain those of an undisturbed run; None for a sequence that stayed."""
        if not self.resumes:
            return None
        return "exact" if all(resume.is_exact for resume in self.resumes) else "inexact"

    def seconds_between(self, start: Event, end: Event) -> float | None:
        """None where one of them is not known. Clocks of two machines may differ; time never runs backwards."""
        if start not in self.unix_s or end not in self.unix_s:
            return None
        return max(self.unix_s[end] - self.unix_s[start], 0.0)

    def to_json(self) -> dict[str, object]:
        stages = {name: self.seconds_between(*events) for name, events in _STAGES.items()}
        usage = self.usage
        if usage.HasField("first_token_equal"):
            stages["step_alignment"] = self.seconds_between(*_STEP_ALIGNMENT)
        return {
            "index": self.index,
            "decode_worker_id": self.decode_worker_id,
            "prefill_worker_id": self.prefill_worker_id,
            "prefilled_locally": self.prefill_worker_id == self.first_decode_worker_id,
            **({"is_simulation": True} if self.is_simulation else {}),
            "numerics": self.numerics or None,
            "attempts": self.num_attempts,
            "deflected": self.deflected or None,
            "redirects": usage.num_redirects,
            "objectives": {
                "ttft_seconds": _or_none(self.objectives.ttft_s),
                "tpot_seconds": _or_none(self.objectives.tpot_s),
            },
            "recomputes": usage.num_recomputes,
            "resumed_elsewhere": self.resumed_elsewhere,
            "resumes": [resume.to_json() for resume in self.resumes],
            "prompt_tokens": usage.num_prompt_tokens,
            "completion_tokens": self.num_generated_tokens,
            "computed_tokens": self.num_computed_tokens,
            "reused_tokens": self.num_reused_tokens,
            "fetched_tokens": self.num_fetched_tokens,
            "fetched": list(map(_part_to_json, usage.fetched)),
            "handoff": {
                "blocks": usage.num_transferred_blocks,
                "bytes": usage.num_transferred_bytes,
                "first_token_equal": usage.first_token_equal if usage.HasField("first_token_equal") else None,
            },
            "digests_checked": self.num_digests_checked,
            "stage_seconds": {
                **{name: seconds for name, seconds in stages.items() if seconds is not None},
                "total": self.total_s,
            },
            "unix_seconds": {event.name.lower(): unix_s for event, unix_s in sorted(self.unix_s.items())},
        }


def _or_none(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def _part_to_json(part: pb.FetchedPrefix) -> dict[str, object]:
    return {
        "holder_id": part.holder_id,
        "tier": part.tier,
        "lane": part.lane,
        "blocks": part.num_blocks,
        "bytes": part.num_bytes,
        "seconds": part.seconds,
    }


def make_receipt(
    index: int,
    usage: pb.Usage,
    stamps: Iterable[pb.Stamp],
    router_unix_s: Mapping[Event, float],
    *,
    decode_worker_id: str,
    numerics: str,
    block_size: int,
    num_attempts: int,
    num_generated_tokens: int,
    is_simulation: bool = False,
    resumes: tuple[Resume, ...] = (),
    objectives: Objectives = _NO_OBJECTIVES,
    deflected: str = "",
) -> Receipt:
    """`router_unix_s`: the sequence's timeline at the router, from ARRIVED to FINISHED. Where the workers have stamped
    the same event theirs counts, so that stages are measured by one clock; there are no `stamps` where a stop string
    ended the sequence before the worker did."""
    known = {int(event) for event in Event}
    return Receipt(
        index=index,
        usage=usage,
        decode_worker_id=decode_worker_id,
        numerics=numerics,
        block_size=block_size,
        num_attempts=num_attempts,
        num_generated_tokens=num_generated_tokens,
        is_simulation=is_simulation,
        unix_s=dict(router_unix_s) | {Event(stamp.event): stamp.unix_s for stamp in stamps if stamp.event in known},
        total_s=max(router_unix_s[Event.FINISHED] - router_unix_s[Event.ARRIVED], 0.0),
        resumes=resumes,
        objectives=objectives,
        deflected=deflected,
    )
