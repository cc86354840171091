"""Holds a finished run (settings, records, samples) and stores it as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from loadtest.figures.scrape import Sample
from loadtest.plan import LoadOptions, Origin, RequestRecord

_SCHEMA = 1


@dataclass(frozen=True)
class MachineUse:
    """Who used the processors of the machine during a run: means, in processors.

    `ours` are this process and what it started. `others` are all other processes of the machine, and what its host took
    away (steal).
    """

    num_processors: int
    ours: float
    others: float

    @property
    def others_share(self) -> float:
        """Of all processors."""
        return self.others / self.num_processors


@dataclass(frozen=True)
class RunResult:
    """One target under one load. `measured_from_s` and `measured_s` are the window in which the requests that count
    were due; the records of warm-up requests are there, marked, and no figure counts them."""

    target: str
    url: str
    model: str
    workload: str
    started_unix_s: float
    options: LoadOptions
    num_planned: int
    num_cut: int
    measured_from_s: float
    measured_s: float
    records: tuple[RequestRecord, ...]
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = field(default=())
    turn: int = 1
    server_command: str = ""
    server_facts: Mapping[str, str] = field(default_factory=dict)
    """What the server's /metrics says of itself: device, kernels, dtype, lanes."""
    origin: Origin = field(default_factory=Origin)
    machine_use: MachineUse | None = None
    """None where it is not known: where the server is not ours, its load cannot be told from that of others."""

    @property
    def measured(self) -> list[RequestRecord]:
        """The records that count, in the order in which they were due."""
        return sorted((each for each in self.records if not each.is_warmup), key=lambda each: each.index)

    @property
    def num_lost(self) -> int:
        """Planned requests without a record: the run was stopped, or a worker of a distributed run went away."""
        return self.num_planned - len(self.records)

    def to_json(self) -> dict[str, object]:
        return {"schema": _SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, object]) -> RunResult:
        """Raises ValueError for what `to_json` has not written."""
        if data.get("schema") != _SCHEMA:
            raise ValueError(f"no result of a run of this version: schema {data.get('schema')!r}")
        try:
            return msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"no result of a run: {error}") from error


def read_result(path: Path) -> RunResult:
    """Raises ValueError that names the file."""
    try:
        return RunResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_result(path: Path, result: RunResult, summary: dict[str, object]) -> None:
    """The file is there when it is complete, and not before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_name(path.name + ".incomplete")
    incomplete.write_text(json.dumps(result.to_json() | {"summary": summary}), encoding="utf-8")
    incomplete.rename(path)
