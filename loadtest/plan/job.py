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
class Job:
    """A target and its load, settled when a run starts. `metrics_urls`: pages of gauges, by process name."""

    target: str
    url: str
    options: LoadOptions
    metrics_urls: Mapping[str, str] = field(default_factory=dict)
