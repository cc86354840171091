"""Names what one run is given: a target and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loadtest.plan.options import LoadOptions


class RunFailed(Exception):
    """The run could not start; the message says why."""


def base_url(text: str) -> str:
    """A server's URL as people write it, with or without /v1 and a slash, as we need it: without."""
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


@dataclass(frozen=True)
class Origin:
    """How a run came about, so that a reader can make it again. Empty where nobody knows."""

    command: str = ""
    """What was typed."""
    commit: str = ""
    """Of this source, which is also that of stacks that were started."""
    machine: str = ""
    """The machine that sends, and serves where stacks were started on it."""
    seed: int | None = None
    """The one that was given; every run makes its own of it."""


@dataclass(frozen=True)
class Job:
    """A target and its load, settled when a run starts. `metrics_urls`: pages of gauges, by process name."""

    target: str
    url: str
    options: LoadOptions
    metrics_urls: Mapping[str, str] = field(default_factory=dict)
    server_command: str = ""
    """What started the target; empty for a server that ran already."""
    origin: Origin = field(default_factory=Origin)
    turn: int = 1
    """Runs of one target at one rate are taken together, but for those of turn 0: with these a rate was looked for."""
