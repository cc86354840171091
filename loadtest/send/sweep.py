"""Runs every target at every rate, with the same load for all; starts each target once.

At one rate all targets get the same requests at the same times. Another rate has prompts of its own, so that no run
finds what an earlier one left in the server's prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from loadtest.figures import RunResult, summarize, write_result
from loadtest.plan import Job, LoadOptions, OptionError, RunFailed
from loadtest.send.client import TargetError, look_up_model
from loadtest.send.dispatch import Progress
from loadtest.send.local_stack import StackFailed
from loadtest.send.targets import Target, serving

Run = Callable[[Job, Callable[[Progress], None]], RunResult]
"""Carries a job out, and shows its counts. It is passed in, since locust takes over a process that imports it."""

_SEEDS_PER_RATE = 1_000_003


class SweepFailed(Exception):
    """A target that could not be measured; the runs before it are kept."""


@dataclass(frozen=True)
class Sweep:
    """The settings of a sweep. `options` has all but the rate; `stack_flags` go to every `tandem up`."""

    targets: tuple[Target, ...]
    rates: tuple[float, ...]
    options: LoadOptions
    stack_flags: tuple[str, ...]
    folder: Path
    """Where each run's result is written, as soon as there is one."""

    def __post_init__(self) -> None:
        if not self.targets or not self.rates:
            raise OptionError("a sweep needs a --target and --rates")
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise OptionError(f"two targets have one name: {', '.join(names)}")
        if list(self.rates) != sorted(set(self.rates)) or self.rates[0] <= 0:
            raise OptionError("--rates must be positive and ascend")

    def load_at(self, rate: float) -> LoadOptions:
        seed = self.options.seed + _SEEDS_PER_RATE * (1 + self.rates.index(rate))
        return replace(self.options, rate=rate, seed=seed)


class SweepWatcher:
    """Follows a sweep; this one ignores all it is told."""

    def preparing(self, target: Target) -> None:
        """The target is being started."""

    def running(self, target: Target, rate: float) -> Callable[[Progress], None]:
        """A run begins; what is returned sees its counts."""
        return lambda progress: None

    def finished(self, result: RunResult) -> None:
        """A run has ended."""


def run_sweep(sweep: Sweep, run: Run, api_key: str, watcher: SweepWatcher) -> list[RunResult]:
    """All results, target by target. Raises SweepFailed, before any run where a URL does not answer."""
    for target in sweep.targets:
        if target.url:
            try:
                look_up_model(target.url, sweep.options.model, api_key)
            except TargetError as error:
                raise SweepFailed(f"{target.name}: {error}") from error
    results: list[RunResult] = []
    for target in sweep.targets:
        watcher.preparing(target)
        try:
            with serving(target, sweep.stack_flags, sweep.options.model) as server:
                for rate in sweep.rates:
                    options = replace(sweep.load_at(rate), model=server.model)
                    job = Job(target.name, server.url, options, server.metrics_urls)
                    result = run(job, watcher.running(target, rate))
                    write_result(
                        sweep.folder / f"{_file_name(target.name)}-{rate:g}.json", result, summarize(result).to_json()
                    )
                    results.append(result)
                    watcher.finished(result)
        except (RunFailed, StackFailed) as error:
            raise SweepFailed(f"{target.name}: {error}") from error
    return results


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
