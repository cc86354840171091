"""How long `tandem up` takes from the command to its first answer, and where that time goes; vLLM beside it.

    make bench BENCHES=tests/bench/bench_start.py
    make bench BENCHES=tests/bench/bench_start.py BENCH_ARGS='--runs 5 --vllm'

Starts the demo model and a random Qwen2 of 0.39 B parameters in turns, and asks each for one token of a short prompt,
again and again, until it answers: that is the end. `--vllm` installs vLLM's CPU build in an environment of its own
under build/compat (2 GB) and starts `vllm serve` with the second model, eager, in the same way and turn. Files are in
the page cache: each model is read once before. Processor seconds are of all processes until the answer, the least of
all runs: a machine that does other things as well changes them little.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.cli.config import DEMO_MODEL
from tests.bench.bench_model import write_bench_model
from tests.bench.vllm_peer import preloaded
from tests.compat import vllm_bench
from tests.compat.tool import BUILD, ToolFailed
from tests.ports import free_port

_TIMEOUT_S = 600.0
_ASK_EVERY_S = 0.05
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Server:
    """A server to start: its command but for the port, and the model that it serves under this name."""

    name: str
    command: tuple[str, ...]
    model_name: str
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


@dataclass(frozen=True)
class Phase:
    """A process was in this phase from `start_s` to `end_s` after the command."""

    process: str
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Start:
    """One start, from the command to the first answer."""

    answered_s: float
    cpu_s: float
    phases: tuple[Phase, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="starts of each")
    parser.add_argument("--model", default="", help="a directory to serve in place of the random model")
    parser.add_argument("--vllm", action="store_true", help="start vLLM as well")
    parser.add_argument("--torch-index", default="", help="where the environment's torch comes from")
    arguments = parser.parse_args()
    if arguments.vllm:
        try:
            vllm_bench.install(arguments.torch_index)
        except ToolFailed as error:
            raise SystemExit(f"vLLM cannot be installed, so there is nothing to compare with: {error}") from error
    with tempfile.TemporaryDirectory() as directory:
        large = Path(arguments.model or write_bench_model(Path(directory)))
        servers = [tandem("tandem up, demo model", DEMO_MODEL), tandem(f"tandem up, {large.name}", large)]
        if arguments.vllm:
            servers.append(vllm(f"vllm serve, {large.name}", large))
        for model in (DEMO_MODEL, large):
            for path in model.iterdir():
                path.read_bytes()
        starts: dict[str, list[Start]] = {server.name: [] for server in servers}
        for run in range(arguments.runs):
            for server in servers:
                starts[server.name].append(measure(server))
                print(f"run {run + 1}: {server.name} {starts[server.name][-1].answered_s:.1f} s", file=sys.stderr)
    print(f"{os.cpu_count()} processors, load average {os.getloadavg()[0]:.1f}; {arguments.runs} runs\n")
    print(summary(starts))
    for server in servers:
        if phases := fastest(starts[server.name]).phases:
            print(phase_table(server.name, phases))


def tandem(name: str, model: Path) -> Server:
    command = (sys.executable, "-m", "services.cli.main", "up", "--log-format=json", "--model", str(model))
    return Server(name, (*command, "--served-model-name=m"), "m")


def vllm(name: str, model: Path) -> Server:
    program = vllm_bench.TOOL.program("vllm")
    environ = vllm_bench.TOOL.environment() | {
        "LD_PRELOAD": ":".join(preloaded()),
        "VLLM_CACHE_ROOT": str(BUILD / "vllm_cache"),
        "VLLM_CPU_KVCACHE_SPACE": "4",
    }
    return Server(name, (program, "serve", str(model), "--served-model-name=m", "--enforce-eager"), "m", environ)


def measure(server: Server) -> Start:
    """Start it, wait for its first answer, and stop it. Ends the process where it does not come up."""
    port = free_port()
    began_s = time.monotonic()
    process = subprocess.Popen(
        [*server.command, f"--port={port}"],
        env=dict(server.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    heard: list[tuple[float, str]] = []
    listening = threading.Thread(target=listen, args=(process, began_s, heard))
    listening.start()
    try:
        await_answer(server, process, port, began_s, lambda: "".join(line for _, line in heard[-20:]))
        answered_s, cpu_s = time.monotonic() - began_s, tree_cpu_s(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        listening.join()
    return Start(answered_s, cpu_s, phases_of(heard, answered_s))


def listen(process: subprocess.Popen[str], began_s: float, heard: list[tuple[float, str]]) -> None:
    assert process.stderr is not None
    with process.stderr as lines:
        for line in lines:
            heard.append((time.monotonic() - began_s, line))


def await_answer(
    server: Server, process: subprocess.Popen[str], port: int, began_s: float, said: Callable[[], str]
) -> None:
    body = json.dumps({"model": server.model_name, "prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0})
    while True:
        if process.poll() is not None or time.monotonic() - began_s > _TIMEOUT_S:
            raise SystemExit(f"{server.name} does not answer:\n{said()}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
            with contextlib.closing(connection):
                connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                if connection.getresponse().status == 200:
                    return
        time.sleep(_ASK_EVERY_S)


def phases_of(heard: Sequence[tuple[float, str]], answered_s: float) -> tuple[Phase, ...]:
    """The phases that the launcher told of, `(second, line)`, each up to its process's next one or to the answer."""
    begun: dict[tuple[str, str], float] = {}
    for second, line in heard:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            # A line of a process's log has a logger; a phase has none.
            if isinstance(entry, dict) and {"process", "message"} <= entry.keys() and "logger" not in entry:
                begun.setdefault((entry["process"], entry["message"]), second)
    phases = []
    for (process, name), start_s in begun.items():
        later = [second for (other, _), second in begun.items() if other == process and second > start_s]
        if start_s < answered_s and process != "tandem":
            phases.append(Phase(process, name, start_s, min([*later, answered_s])))
    return tuple(sorted(phases, key=lambda phase: (phase.process, phase.start_s)))


def tree_cpu_s(pid: int) -> float:
    """Processor seconds, user and system, of a process, all that it has started, and those of them that have ended."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(fields[1])
            seconds[int(path.parent.name)] = sum(map(int, fields[11:15])) / _TICKS_PER_S
    tree = {pid}
    while more := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(seconds.get(member, 0.0) for member in tree)


def fastest(starts: Sequence[Start]) -> Start:
    return min(starts, key=lambda start: start.answered_s)


def summary(starts: Mapping[str, Sequence[Start]]) -> str:
    """A table: each server's seconds to its first answer, of the fastest and the median run, and processor seconds."""
    lines = ["| | first answer, s: least | median | processor s |", "|---|---|---|---|"]
    for name, runs in starts.items():
        seconds = sorted(start.answered_s for start in runs)
        cpu_s = min(start.cpu_s for start in runs)
        lines.append(f"| {name} | {seconds[0]:.1f} | {seconds[len(seconds) // 2]:.1f} | {cpu_s:.1f} |")
    return "\n".join([*lines, ""])


def phase_table(name: str, phases: Sequence[Phase]) -> str:
    """A table of one start: each process's phases."""
    lines = [f"{name}, fastest run", "", "| process | phase | from s | for s |", "|---|---|---|---|"]
    for phase in phases:
        took_s = phase.end_s - phase.start_s
        lines.append(f"| {phase.process} | {phase.name} | {phase.start_s:.2f} | {took_s:.2f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
