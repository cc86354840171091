"""Measures the planner: how fast it simulates, how far leaps are from steps, and whether the real stack agrees.

    make bench-planner
    make bench-planner BENCH_ARGS="--parts speed --num-requests 1000000 --num-workers 1000"

The real stack is `tandem up --engine paced`: real router, real processes, real handoffs, steps as long as a profile
says. Its delays, and what a step takes beside its pace, are taken from a calm run of lone requests; another trace is
compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import httpx

from loadtest.send import start_stack, stop_stack
from services.budgets import Objectives
from services.engine.paced import read_profile
from services.planner import Delays, Limits, Outcomes, PlannedRequest, Setup, Shape, Workload, simulate

PARTS = ("speed", "leaps", "stack")
OBJECTIVES = Objectives(ttft_s=0.5, tpot_s=0.015)
REAL_OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.035)
SLOW = {
    "origin": "a bench: slow enough that two cores carry four workers' share of everything else",
    "base_s": 0.02, "prompt_token_s": 8e-4, "prompt_pair_s": 4e-9, "running_s": 5e-4, "context_token_s": 1e-7,
    "max_num_seqs": 32, "max_num_batched_tokens": 256,
}  # fmt: skip
_NUM_BLOCKS = 1024


def requests(num: int, rate: float, seed: int, lengths: tuple[int, int, int, int]) -> Workload:
    """Poisson arrivals; a fifth of the prompts begins as another one does. `lengths`: of prompts and of answers."""
    rng = random.Random(seed)
    at_s, made = 0.0, []
    for number in range(num):
        at_s += rng.expovariate(rate)
        first = rng.randrange(50) if rng.random() < 0.2 else 100 + number
        blocks = (first, *range(10**7 + 40 * number, 10**7 + 40 * number + lengths[1] // 64 + 1))
        made.append(PlannedRequest(at_s, rng.randint(*lengths[:2]), rng.randint(*lengths[2:]), blocks))
    return Workload(made, 64)


def speed(num_requests: int, num_workers: int) -> None:
    """Processor time of one run."""
    profile = read_profile("gpu")
    num_prefill = round(0.4 * num_workers)
    limits = Limits(profile.max_num_seqs, profile.max_num_batched_tokens, 8192)
    setup = Setup(profile.rates, OBJECTIVES, limits, max_concurrent_requests=1 << 20, max_queue=1 << 20)
    workload = requests(num_requests, 6.0 * num_workers, 1, (200, 2000, 20, 300))
    started_s = time.process_time()
    outcomes = simulate(workload, Shape(num_prefill, num_workers - num_prefill), setup)
    seconds = time.process_time() - started_s
    print(
        f"{num_requests:,} requests, {num_workers:,} workers ({outcomes.shape}): {seconds:.1f} s of a core,"
        f" {seconds / num_requests * 1e3:.2f} ms a request, {outcomes.num_steps:,} steps; good {outcomes.good:.1%}",
        flush=True,
    )


def leaps(num_requests: int) -> None:
    """Leaps against steps, at sizes where both can be run."""
    profile = read_profile("gpu")
    limits = Limits(profile.max_num_seqs, profile.max_num_batched_tokens, 4096)
    setup = Setup(profile.rates, OBJECTIVES, limits)
    print("| fleet | TTFT p50 | p90 | TPOT p50 | p90 | good | processor time |\n|---|---|---|---|---|---|---|")
    for shape in (Shape(0, 4), Shape(2, 2), Shape(0, 8), Shape(4, 4), Shape(0, 16), Shape(8, 8), Shape(3, 5, True)):
        workload = requests(num_requests, 7.0 * shape.num_workers, 2, (200, 2000, 20, 300))
        both: list[tuple[Outcomes, float]] = []
        for takes_steps in (True, False):
            started_s = time.process_time()
            both.append((simulate(workload, shape, setup, takes_steps=takes_steps), time.process_time() - started_s))
        (steps, steps_s), (leapt, leaps_s) = both
        ratios = [
            getattr(getattr(leapt, name), place) / getattr(getattr(steps, name), place) - 1
            for name in ("ttft", "tpot")
            for place in ("p50", "p90")
        ]
        print(
            f"| {shape} | {' | '.join(f'{ratio:+.2%}' for ratio in ratios)} | {leapt.good - steps.good:+.2%} |"
            f" {leaps_s / steps_s:.2f} |",
            flush=True,
        )


async def replay(url: str, workload: Workload) -> list[tuple[float, float, int]]:
    """Send every prompt at its time, streamed; the client's TTFT and TPOT, and tokens, of each."""
    found: list[tuple[float, float, int]] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def ask(request: PlannedRequest, due_s: float) -> None:
            prompt = [1000 + token_id % 1000 for token_id in workload.prompt(request)]
            body = {"model": "bench", "prompt": prompt, "max_tokens": request.num_output_tokens, "ignore_eos": True}
            stamps: list[float] = []
            async with client.stream(
                "POST", "/v1/completions", json=body | {"temperature": 0, "stream": True}
            ) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("data: {") and '"choices":[{' in line.replace(" ", ""):
                        stamps.append(time.perf_counter())
            if stamps:
                num = request.num_output_tokens
                tpot_s = (stamps[-1] - stamps[0]) / (num - 1) if num > 1 else 0.0
                found.append((stamps[0] - due_s, tpot_s, num))

        start_s = time.perf_counter() + 0.5
        tasks = []
        for request in workload.requests:
            due_s = start_s + request.at_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(request, due_s)))
        await asyncio.gather(*tasks)
    return found


def stack(num_requests: int) -> None:
    """The real stack against the planner, on a trace that nothing was taken from."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "slow.json"
        path.write_text(json.dumps(SLOW))
        profile = read_profile(str(path))
        limits = Limits(profile.max_num_seqs, profile.max_num_batched_tokens, _NUM_BLOCKS, max_model_len=2048)
        setup = Setup(profile.rates, REAL_OBJECTIVES, limits)
        flags = ["--served-model-name", "bench", "--engine", "paced", "--paced-profile", str(path)]
        flags += ["--num-gpu-blocks-override", str(_NUM_BLOCKS)]
        print(
            "| fleet | | TTFT p50 ms | p90 | TPOT p50 ms | good | good/s |\n|---|---|---|---|---|---|---|", flush=True
        )
        for shape in (Shape(1, 1), Shape(0, 2), Shape(2, 2)):
            workers = ["--prefill", str(shape.num_prefill), "--decode", str(shape.num_decode)]
            if not shape.num_prefill:
                workers = ["--colocated", "--decode", str(shape.num_decode)]
            calm = requests(12, 0.7, 3, (150, 300, 8, 16))
            load = requests(num_requests, 1.6 * shape.num_workers, 4, (50, 700, 10, 60))
            running = start_stack(str(shape), [*flags, *workers])
            try:
                asyncio.run(replay(running.url, calm))  # processes, connections and learners warm up
                lone = asyncio.run(replay(running.url, calm))
                real = asyncio.run(replay(running.url, load))
            finally:
                stop_stack(running)
            told = simulate(load, shape, _calibrated(calm, lone, shape, setup), takes_steps=True)
            _row(f"{shape} | planned", [(e.ttft_s, e.tpot_s, e.num_output_tokens) for e in told.outcomes], load)
            _row(f"{shape} | real", real, load)
    print(f"\n{num_requests} requests each; good: TTFT <= 1 s and TPOT <= 35 ms. A fleet's constants are those of a"
          " calm run before it, of other requests.")  # fmt: skip


def _calibrated(calm: Workload, lone: Sequence[tuple[float, float, int]], shape: Shape, setup: Setup) -> Setup:
    """What is constant, from lone requests: what their tokens take beyond the profile goes to each step, the rest of
    their TTFT to the handoff, or to the order."""
    none = simulate(calm, shape, replace(setup, delays=Delays(0.0, 0.0, 0.0)), takes_steps=True)
    beside_s = max(statistics.median(tpot_s for _, tpot_s, num in lone if num > 1) - none.tpot.p50, 0.0)
    rates = replace(setup.rates, base_s=setup.rates.base_s + beside_s)
    rest_s = max(statistics.median(ttft_s for ttft_s, _, _ in lone) - none.ttft.p50 - 2 * beside_s, 0.0)
    if shape.num_prefill:
        delays = Delays(order_s=0.002, frame_s=0.001, handoff_s=max(rest_s - 0.005, 0.0))
    else:
        delays = Delays(order_s=max(rest_s - 0.001, 0.0), frame_s=0.001)
    return replace(setup, rates=rates, delays=delays)


def _row(name: str, found: Sequence[tuple[float, float, int]], load: Workload) -> None:
    ttft_s, tpot_s = sorted(each[0] for each in found), [each[1] for each in found if each[2] > 1]
    limits = REAL_OBJECTIVES.ttft_s, REAL_OBJECTIVES.tpot_s
    num_good = sum(0 <= each[0] <= limits[0] and each[1] <= limits[1] for each in found)
    print(
        f"| {name} | {statistics.median(ttft_s) * 1e3:.0f} | {ttft_s[int(0.9 * (len(ttft_s) - 1))] * 1e3:.0f} |"
        f" {statistics.median(tpot_s) * 1e3:.1f} | {num_good / len(load.requests):.1%} |"
        f" {num_good / load.span_s:.2f} |",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--num-requests", type=int, default=100_000, help="of the part `speed`")
    parser.add_argument("--num-workers", type=int, default=1000)
    parser.add_argument("--num-compared", type=int, default=2000, help="requests of the part `leaps`")
    parser.add_argument("--num-real", type=int, default=100, help="requests to each real fleet")
    options = parser.parse_args()
    if "speed" in options.parts:
        speed(options.num_requests, options.num_workers)
    if "leaps" in options.parts:
        leaps(options.num_compared)
    if "stack" in options.parts:
        stack(options.num_real)
    return 0


if __name__ == "__main__":
    sys.exit(main())
