"""How long a fleet takes to serve again after a kill -9 of all its processes at once, beside a cold start of it.

    make bench BENCHES=tests/bench/bench_killed.py BENCH_ARGS='--runs 3 --prefill 2 --decode 2'

`tandem up` starts workers, router and Redis; once all are ready everything that it has started is killed, the process
that workers fork from as well. Both times a client asks again and again until it has an answer: what counts is the time
between the slowest process's word that it is ready and that answer, and, against the cold start's slowest process, the
whole time from the kill.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil

from services.cli.config import DEMO_MODEL
from tests.bench.bench_start import Server, await_answer, listen, phases_of, tandem
from tests.ports import free_port

_ALL_READY_S = 120.0


def measure(server: Server, num_processes: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(slowest process ready, first answer), seconds after the command; and the same, seconds after the kill."""
    port = free_port()
    began_s = time.monotonic()
    process = subprocess.Popen(
        [*server.command, f"--port={port}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    heard: list[tuple[float, str]] = []
    listening = threading.Thread(target=listen, args=(process, began_s, heard))
    listening.start()

    def wait(since_s: float) -> tuple[float, float]:
        await_answer(server, process, port, began_s, lambda: "".join(line for _, line in heard[-20:]))
        answered_s = time.monotonic() - began_s
        while len(ready := ready_s(heard, since_s)) < num_processes:
            if time.monotonic() - began_s - answered_s > _ALL_READY_S:
                raise SystemExit(f"only {', '.join(ready)} are ready")
            time.sleep(0.05)
        return max(ready.values()) - since_s, answered_s - since_s

    try:
        cold = wait(0.0)
        killed_s = time.monotonic() - began_s
        for victim in psutil.Process(process.pid).children(recursive=True):
            victim.kill()
        return cold, wait(killed_s)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        listening.join()


def ready_s(heard: list[tuple[float, str]], since_s: float) -> dict[str, float]:
    """When each process said that it is ready, of what was heard later than `since_s`."""
    phases = phases_of([(second, line) for second, line in heard if second > since_s], float("inf"))
    return {phase.process: phase.start_s for phase in phases if phase.name == "ready"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    options = parser.parse_args()
    server = tandem("tandem up", options.model)
    server = replace(server, command=(*server.command, f"--prefill={options.prefill}", f"--decode={options.decode}"))
    print(
        "| run | cold: slowest ready, s | first answer, s | after the kill: slowest ready, s | first answer, s | load |"
    )
    print("|---|---|---|---|---|---|")
    for run in range(options.runs):
        cold, killed = measure(server, options.prefill + options.decode + 1)
        cells = [f"{seconds:.1f}" for seconds in (*cold, *killed)]
        print(f"| {run + 1} | {' | '.join(cells)} | {os.getloadavg()[0]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
