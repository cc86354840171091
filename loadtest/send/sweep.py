"""Runs every target with the same load for all, at the rates given, or at those that it finds each can keep up with.

At one rate all targets get the same requests at the same times. Another rate, and another round, has prompts of its
own, so that no run finds what an earlier one left in the server's prefix cache. Targets take turns, the first one of a
round is the last one of the round before: what changes slowly on the machine falls on all alike.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from loadtest.figures import RunResult, summarize, write_result
from loadtest.plan import Job, LoadOptions, OptionError, Origin, RequestRecord, RunFailed, lone_ttft_s, objectives_from
from loadtest.send.client import TargetError, look_up_model
from loadtest.send.dispatch import Progress
from loadtest.send.local_stack import StackFailed
from loadtest.send.machine_watch import MachineWatch
from loadtest.send.search import RateSearch
from loadtest.send.targets import Server, Target, serving

Run = Callable[[Job, Callable[[Progress], None]], RunResult]
"""Carries a job out, and shows its counts. It is passed in, since locust takes over a process that imports it."""

_SEEDS_PER_RUN = 1_000_003
_MAX_ROUNDS = 100
_NUM_LONE, _LONE_RATE = 6, 10.0
# The least requests of a run that looks for a rate, and of one that compares: fewer say nothing.
_MIN_PROBE, _MIN_COMPARED = 12, 20
_PROBE_SHARE = 0.5
# Below the rate at which the least probe takes this many times the duration, nothing is looked for.
_MAX_PROBE_SHARE = 2.0
# A search asks for more than 90 % good, so that what it finds is still healthy when it is measured longer.
_KEPT = 0.95
# Of the prefill rate of one worker: where a search begins.
_FIRST_LOAD = 0.5
_MAX_PROBES = 12


class SweepFailed(Exception):
    """A target that could not be measured; the runs before it are kept."""


@dataclass(frozen=True)
class Sweep:
    """The settings of a sweep. `options` has all but the rate; `stack_flags` go to every `tandem up`."""

    targets: tuple[Target, ...]
    rates: tuple[float, ...]
    """Ascending; none: they are looked for."""
    options: LoadOptions
    stack_flags: tuple[str, ...]
    folder: Path
    """Where each run's result is written, as soon as there is one. Results of an earlier sweep there are removed: they
    would be taken for this one's."""
    rounds: int = 1
    sets_objectives: bool = False
    """Whether the objectives of `options` are replaced by what lone requests take on the first target, times five."""
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        if not self.targets:
            raise OptionError("a sweep needs a --target")
        names = [target.name for target in self.targets]
        if len(set(names)) < len(names):
            raise OptionError(f"two targets have one name: {', '.join(names)}")
        if list(self.rates) != sorted(set(self.rates)) or (self.rates and self.rates[0] <= 0):
            raise OptionError("--rates must be positive and ascend")
        if not 1 <= self.rounds < _MAX_ROUNDS:
            raise OptionError(f"--rounds must be 1 to {_MAX_ROUNDS - 1}, got {self.rounds}")

    def load_at(self, rate: float, turn: int) -> LoadOptions:
        """The load of one run; turn 0 looks for a rate and is shorter."""
        number = turn + _MAX_ROUNDS * round(rate * 1000)
        options = replace(self.options, rate=rate, seed=self.options.seed + _SEEDS_PER_RUN * (1 + number))
        if self.rates:
            return options
        share, least = (1.0, _MIN_COMPARED) if turn else (_PROBE_SHARE, _MIN_PROBE)
        number = self.options.num_requests or max(least, round(rate * self.options.duration_s * share))
        return replace(options, num_requests=number)


class SweepWatcher:
    """Follows a sweep; this one ignores all it is told."""

    def preparing(self, target: Target) -> None:
        """The target is being started."""

    def running(self, target: Target, rate: float) -> Callable[[Progress], None]:
        """A run begins; what is returned sees its counts."""
        return lambda progress: None

    def finished(self, result: RunResult) -> None:
        """A run has ended."""

    def says(self, line: str) -> None:
        """What the sweep has found out, or does next."""


def run_sweep(sweep: Sweep, run: Run, api_key: str, watcher: SweepWatcher) -> list[RunResult]:
    """All results. Raises SweepFailed, before any run where a URL does not answer."""
    for target in sweep.targets:
        if target.url:
            try:
                look_up_model(target.url, sweep.options.model, api_key)
            except TargetError as error:
                raise SweepFailed(f"{target.name}: {error}") from error
    for path in sweep.folder.glob("*.json"):
        path.unlink()
    with ExitStack() as stack:
        return _UnderWay(sweep, run, watcher, stack).results()


class _UnderWay:
    """A sweep that is being carried out. One target serves at a time; `stack` stops the last one."""

    def __init__(self, sweep: Sweep, run: Run, watcher: SweepWatcher, stack: ExitStack) -> None:
        self._sweep = sweep
        self._run = run
        self._watcher = watcher
        self._serving = stack.enter_context(ExitStack())
        self._up: tuple[Target, Server] | None = None
        self._results: list[RunResult] = []

    def results(self) -> list[RunResult]:
        sweep = self._sweep
        if sweep.sets_objectives or not sweep.rates:
            lone = self._lone(sweep.targets[0])
            if sweep.sets_objectives:
                self._sweep = sweep = replace(sweep, options=replace(sweep.options, goodput=objectives_from(lone)))
                self._watcher.says(f"a good request: {sweep.options.slo} (five times what a lone one takes)")
            rates = sweep.rates or self._found_rates(_FIRST_LOAD / lone_ttft_s(lone))
        else:
            rates = sweep.rates
        # The target that served last goes first: it need not be started again.
        order = list(sweep.targets) if sweep.rates else list(reversed(sweep.targets))
        for turn in range(1, sweep.rounds + 1):
            for target in order:
                for rate in rates:
                    self._measure(target, rate, turn)
            order.reverse()
        return self._results

    def _lone(self, target: Target) -> list[RequestRecord]:
        """Requests one after the other, the first of which only warms the server up. Raises ValueError where none is
        answered."""
        self._watcher.says(f"{target.name}: what do lone requests take?")
        records: list[RequestRecord] = []
        for number in range(_NUM_LONE):
            options = self._sweep.load_at(_LONE_RATE, 0)
            options = replace(
                options, arrivals="constant", num_requests=1, warmup_requests=0, seed=options.seed + number
            )
            records += self._result(target, options, 0, quietly=True).records
        objectives_from(records[1:])
        return records[1:]

    def _found_rates(self, start: float) -> tuple[float, ...]:
        """The highest rate that each target keeps up with, ascending."""
        found: set[float] = set()
        for target in self._sweep.targets:
            self._watcher.says(f"{target.name}: which rate can it keep up with?")
            search = RateSearch(start)
            for _ in range(_MAX_PROBES):
                rate = search.next_rate
                if rate is None or _MIN_PROBE / rate > _MAX_PROBE_SHARE * self._sweep.options.duration_s:
                    break
                result = self._measure(target, rate, 0)
                search.take(summarize(result).good >= _KEPT)
            if search.found is None:
                self._watcher.says(f"{target.name}: keeps up with no rate that was tried")
            else:
                self._watcher.says(f"{target.name}: keeps up with {search.found:g}/s")
                found.add(search.found)
                start = search.found
        if found:
            rates = " and ".join(f"{rate:g}/s" for rate in sorted(found))
            self._watcher.says(f"now all at {rates}, taking turns, {self._sweep.rounds} rounds")
        return tuple(sorted(found))

    def _measure(self, target: Target, rate: float, turn: int) -> RunResult:
        """One run, its result kept and written."""
        result = self._result(target, self._sweep.load_at(rate, turn), turn)
        mark = {0: "-search", 1: ""}.get(turn, f"-{turn}")
        path = self._sweep.folder / f"{_file_name(target.name)}-{rate:g}{mark}.json"
        write_result(path, result, summarize(result).to_json())
        self._results.append(result)
        self._watcher.finished(result)
        return result

    def _result(self, target: Target, options: LoadOptions, turn: int, quietly: bool = False) -> RunResult:
        try:
            server = self._server(target)
            job = Job(
                target.name, server.url, replace(options, model=server.model), server.metrics_urls, server.command,
                self._sweep.origin, turn,
            )  # fmt: skip
            watch = MachineWatch() if server.command else None
            result = self._run(job, (lambda _: None) if quietly else self._watcher.running(target, options.rate))
            return replace(result, machine_use=watch.use()) if watch else result
        except (RunFailed, StackFailed) as error:
            raise SweepFailed(f"{target.name}: {error}") from error

    def _server(self, target: Target) -> Server:
        if self._up is None or self._up[0] != target:
            self._serving.close()
            self._watcher.preparing(target)
            flags, model = self._sweep.stack_flags, self._sweep.options.model
            self._up = target, self._serving.enter_context(serving(target, flags, model))
        return self._up[1]


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
