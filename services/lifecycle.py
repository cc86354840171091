"""Stamps a request's lifecycle events in a timeline, from which metrics, traces and receipts derive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum


class Event(IntEnum):
    """Same numbers as `tandem.v1.Event`; worker.proto says what each one means."""

    ARRIVED = 1
    TOKENIZED = 2
    ROUTED = 3
    RECEIVED = 4
    PREFILL_ORDERED = 5
    PREFILL_QUEUED = 6
    PREFILL_SCHEDULED = 7
    BLOCKS_RESERVED = 8
    PREFILL_FINISHED = 9
    BLOCKS_READ = 10
    HANDOFF_CONFIRMED = 11
    DECODE_JOINED = 12
    FIRST_TOKEN = 13
    FINISHED = 14


@dataclass
class Timeline:
    """Holds when each event last happened, in unix seconds by the clock passed in."""

    clock: Callable[[], float]
    unix_s: dict[Event, float] = field(default_factory=dict)

    def mark(self, event: Event) -> None:
        self.unix_s[event] = self.clock()

    def seconds_between(self, start: Event, end: Event) -> float | None:
        """`end - start` in seconds, or None where one of them has not happened."""
        if start in self.unix_s and end in self.unix_s:
            return self.unix_s[end] - self.unix_s[start]
        return None
