"""Runs a fleet under load and faults, and prints what its clients saw; `make chaos MINUTES=10`.

python -m tests.chaos --minutes 10 --seed 7

Status 0: every answer was right or was cut by its client or died with its router, nothing leaked, everybody serves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx

from tests.chaos import network
from tests.chaos.faults import Nemesis
from tests.chaos.fleet import Fleet
from tests.chaos.load import ALLOWED, Load
from tests.hf_models import write_model
from tests.peers import AUTHORIZATION

DIRECTORY = Path("build/chaos")
_REST_S = 60.0
_MAX_MORE_BYTES, _MAX_MORE_DESCRIPTORS = 200 << 20, 40


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second")
    parser.add_argument("--directory", type=Path, default=DIRECTORY)
    flags = parser.parse_args(argv)
    with_networks = True
    try:
        network.enter()
    except network.NoNamespaces as error:
        with_networks = False
        print(f"nobody is cut off: {error}", flush=True)
    directory = flags.directory.resolve()
    model = directory.with_name(directory.name + "-model")
    if not model.exists():
        write_model(model, "qwen3")
    return asyncio.run(_run(Fleet(directory, model, with_networks), flags))


async def _run(fleet: Fleet, flags: argparse.Namespace) -> int:
    load, nemesis = Load(fleet, flags.seed), Nemesis(fleet, flags.seed)
    problems: list[str] = []
    try:
        await asyncio.to_thread(fleet.start_all)
        await load.learn()
        before = {name: fleet.memory(member) for name, member in fleet.members.items()}
        stop = asyncio.Event()
        loading = asyncio.create_task(load.run(flags.rate, stop))
        try:
            await nemesis.run(60 * flags.minutes)
        except TimeoutError as error:
            problems.append(str(error))
        stop.set()
        await loading
        problems += await asyncio.to_thread(_unrest, fleet)
        after = {name: fleet.memory(member) for name, member in fleet.members.items() if member.alive}
        problems += nemesis.unexpected
        problems += _growth(before, after)
    finally:
        await load.close()
        await asyncio.to_thread(fleet.close)
    failed = [result for result in load.results if result.outcome not in ALLOWED]
    problems += [f"{result.case.name}: {result.outcome}: {result.detail[:600]}" for result in failed]
    if not any(result.outcome == "right" for result in load.results):
        problems.append("no request was answered: nothing was tested")
    print(_table(load, nemesis, before, after))
    for problem in problems[:20]:
        print(f"! {problem}")
    if problems:
        print(f"{len(problems)} problems; logs in {flags.directory}; the same faults: --seed {flags.seed}")
    (flags.directory / "report.json").write_text(
        json.dumps({"problems": problems, "outcomes": load.counts, "faults": nemesis.dealt}, indent=1), encoding="utf-8"
    )
    return 1 if problems else 0


def _unrest(fleet: Fleet) -> list[str]:
    """Which gauges do not come back to zero, and whose books are wrong."""
    deadline = time.monotonic() + _REST_S
    while True:
        problems = []
        for member in fleet.members.values():
            with contextlib.suppress(httpx.HTTPError):
                problems += _held(fleet, member.name)
                continue
            problems.append(f"{member.name} does not answer")
        if not problems or time.monotonic() > deadline:
            return problems
        time.sleep(0.2)


def _held(fleet: Fleet, name: str) -> list[str]:
    member = fleet.members[name]
    if member.role == "router":
        running = sum(fleet.metric(member, f"vllm:num_requests_{state}") for state in ("running", "waiting"))
        return [f"{name} has {running:g} requests under way"] if running else []
    if member.role == "store":
        return []
    held = fleet.metric(member, "tandem:kv_blocks") - fleet.metric(member, "tandem:kv_blocks_free")
    response = fleet.http.get(f"{member.http_url}/debug/integrity", headers=AUTHORIZATION)
    problems = [f"{name} holds {held:g} blocks"] if held else []
    return problems + ([f"{name}: {response.text}"] if response.status_code != 200 else [])


def _growth(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    """Who has grown since it was idle at first."""
    problems = []
    for name, (num_bytes, num_descriptors) in after.items():
        if num_bytes > before[name][0] + _MAX_MORE_BYTES:
            problems.append(f"{name} grew from {before[name][0] >> 20} to {num_bytes >> 20} MiB")
        if num_descriptors > before[name][1] + _MAX_MORE_DESCRIPTORS:
            problems.append(f"{name} has {num_descriptors} descriptors, {before[name][1]} at first")
    return problems


def _table(load: Load, nemesis: Nemesis, before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> str:
    lines = ["", "| requests | |", "|---|---|"]
    lines += [f"| {outcome} | {count} |" for outcome, count in sorted(load.counts.items())]
    lines += [f"| resumed or moved | {sum(result.num_resumes > 0 for result in load.results)} |", ""]
    lines += ["| fault | dealt | a stream's longest silence, s | all serve again after, s |", "|---|---|---|---|"]
    for name, count in sorted(nemesis.dealt.items()):
        spans = [(begin, end) for each, begin, end in nemesis.spans if each == name]
        silences = [
            result.silence_s
            for result in load.results
            for begin, end in spans
            if result.heard_at > begin and result.heard_at - result.silence_s < end
        ]
        recovery, last = max((seconds, last) for each, seconds, last in nemesis.recoveries if each == name)
        lines.append(f"| {name} | {count} | {max(silences, default=0):.1f} | {recovery:.1f} ({last}) |")
    lines += ["", "| process | MiB, descriptors at first | in the end | starts |", "|---|---|---|---|"]
    starts = Counter({name: len(member.ends) + 1 for name, member in nemesis.fleet.members.items()})
    for name, (num_bytes, num_descriptors) in before.items():
        last = after.get(name, (0, 0))
        lines.append(f"| {name} | {num_bytes >> 20}, {num_descriptors} | {last[0] >> 20}, {last[1]} | {starts[name]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
