"""Holds what every process's `/metrics` shares: labels of the process, figures of the process.

Each process has one registry and no state beside it: nothing is lost or counted twice when processes come and go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Info, ProcessCollector
from prometheus_client.core import Metric

import services


def add_process_series(registry: CollectorRegistry, role: str) -> None:
    """CPU, memory and files of this process (`process_…`), and which build it is."""
    ProcessCollector(registry=registry)
    build = Info("tandem:build", "The build of this process, in its labels.", ["role"], registry=registry)
    build.labels(role).info({"version": services.__version__})


class ExposedRegistry(CollectorRegistry):
    """Shows the series of `inner` with `labels` added, without creation times (half as many series again)."""

    def __init__(self, inner: CollectorRegistry, labels: Mapping[str, str]) -> None:
        super().__init__(auto_describe=False)
        self._inner = inner
        self._labels = dict(labels)

    def collect(self) -> Iterable[Metric]:
        for family in self._inner.collect():
            exposed = Metric(family.name, family.documentation, family.type, family.unit)
            exposed.samples = [
                sample._replace(labels={**self._labels, **sample.labels})
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
            yield exposed
