"""What every process's `/metrics` has in common: labels of the whole process, figures of the process, bucket edges.

Each process has one registry of its own and no state beside it, so nothing is lost or counted twice when processes
come and go. The request series have vLLM's names and edges, with some smaller ones in front for small models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import services

TTFT_S: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
REQUEST_S: Final = (
    0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
STAGE_S: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
"""A stage of a request: from a block's read over RDMA to a long prompt on a laptop."""
READ_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SPEED_BYTES_PER_S: Final = (1e6, 3e6, 1e7, 3e7, 1e8, 3e8, 1e9, 3e9, 1e10, 2e10, 4e10, 1e11, 4e11)
"""From a bad network to NVLink."""
INDEX_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
TOKENS: Final = tuple(mantissa * 10**exponent for exponent in range(7) for mantissa in (1, 2, 5))
BATCH_TOKENS: Final = tuple(float(2**exponent) for exponent in range(16))
BATCH_SEQUENCES: Final = tuple(float(2**exponent) for exponent in range(11))


def add_process_series(registry: CollectorRegistry, role: str) -> None:
    """CPU, memory and files of this process (`process_…`), and which build it is."""
    ProcessCollector(registry=registry)
    build = Info("tandem:build", "The build of this process, in its labels.", ["role"], registry=registry)
    build.labels(role).info({"version": services.__version__})


class ExposedRegistry(CollectorRegistry):
    """The series of `inner` as they are scraped: each with `labels` in addition to its own, and without the time that
    it was created at, which would be half as many series again."""

    def __init__(self, inner: CollectorRegistry, labels: Mapping[str, str]) -> None:
        super().__init__(auto_describe=False)
        self.register(_Exposed(inner, dict(labels)))


class _Exposed(Collector):
    def __init__(self, inner: CollectorRegistry, labels: dict[str, str]) -> None:
        self._inner = inner
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        for family in self._inner.collect():
            exposed = Metric(family.name, family.documentation, family.type, family.unit)
            exposed.samples = [
                sample._replace(labels={**self._labels, **sample.labels})
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
            yield exposed


def gauge(name: str, help: str, value: float, labels: Mapping[str, str] | None = None) -> Metric:
    """A gauge read at scrape time, for a collector."""
    family = GaugeMetricFamily(name, help, labels=list(labels or {}))
    family.add_metric(list((labels or {}).values()), value)
    return family


def counter(name: str, help: str, value: float) -> Metric:
    """A counter read at scrape time, for a collector."""
    return CounterMetricFamily(name, help, value=value)
