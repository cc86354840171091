"""What the router costs: latency that it adds, streamed tokens that a core carries, routing among many; targets.

    make bench-router
    python -m tests.bench.bench_router [--num-requests 160] [--concurrency 16] [--step-ms 5] [--repeats 3]

Routers in processes of their own, a worker without a model in another that gives every request its first token at once
and then one a step in one frame, as decode workers do, and this process as the client. What is counted is the routers'
processor time, the least of the repeats, so a busy machine shows little; but for the latency, which is the client's:
from the request to its first event, of which the worker's part is nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from services.router.text import ModelTokenizer
from tests.bench.router_processes import BenchRouter, Client, bench_router, connect, prefill_records, stepping_worker
from tests.router.tiny_model import byte_level_tokenizer, write_tiny_model

NUM_TOKENS = 100
CHAT = {"messages": [{"role": "user", "content": "Hello world! How are you today?"}]}
TEXT = {"prompt": "Hello world! How are you today?"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion, whole, 1 token": ("/v1/completions", {**TEXT, "max_tokens": 1}),
    "completion, whole, 100 tokens": ("/v1/completions", {**TEXT, "max_tokens": NUM_TOKENS}),
    "completion, stream, 100 tokens": ("/v1/completions", {**TEXT, "max_tokens": NUM_TOKENS, "stream": True}),
    "chat, stream, 100 tokens": ("/v1/chat/completions", {**CHAT, "max_tokens": NUM_TOKENS, "stream": True}),
    "chat, stream, 100 tokens, logprobs": (
        "/v1/chat/completions",
        {**CHAT, "max_tokens": NUM_TOKENS, "stream": True, "logprobs": True, "top_logprobs": 2},
    ),
    "completion, whole, prompt of 4,000 ids": ("/v1/completions", {"prompt": [7, 300] * 2000, "max_tokens": 1}),
}
PATH, STREAM = "/v1/chat/completions", {**CHAT, "max_tokens": NUM_TOKENS, "stream": True}
RATE_PER_S = 100.0
LATENCY_TOKENS = 16
NUM_STREAMS = 300
STREAM_STEP_MS = 50.0  # a rate that the router keeps up with: tokens that pile up would go in one event
FEW, MANY = 10, 1000
TARGETS = {
    "added latency at 100 req/s, p50, ms": 2.0,
    "added latency at 100 req/s, p99, ms": 8.0,
    "streamed tokens/s on one core, 300 streams": 12_000.0,
    "CPU per request, 1,000 workers against 10": 1.3,
}


async def drive(port: int, path: str, body: dict[str, Any], each: int, concurrency: int) -> None:
    """So many connections, each with so many requests, one after the other."""

    async def run(client: Client) -> None:
        for _ in range(each):
            await client.ask(path, body)
        await client.close()

    clients = [await connect(port) for _ in range(concurrency)]
    await asyncio.gather(*map(run, clients))


def measure(router: BenchRouter, path: str, body: dict[str, Any], num_requests: int, concurrency: int) -> float:
    """Microseconds of the router per request."""
    each = num_requests // concurrency
    uvloop.run(drive(router.port, path, body, 1, concurrency))
    before = router.cpu_s()
    uvloop.run(drive(router.port, path, body, each, concurrency))
    return (router.cpu_s() - before) / (each * concurrency) * 1e6


async def latencies(port: int, num_requests: int) -> list[float]:
    """Milliseconds from a request to its first event: an open loop, Poisson arrivals."""
    rng, loop, idle, tasks = random.Random(11), asyncio.get_running_loop(), list[Client](), list[asyncio.Task[float]]()
    due_s = loop.time()

    async def run(client: Client) -> float:
        began_s = loop.time()
        await client.ask(PATH, {**STREAM, "max_tokens": LATENCY_TOKENS})
        idle.append(client)
        assert client.first_event_s is not None
        return (client.first_event_s - began_s) * 1e3

    for _ in range(num_requests):
        due_s += rng.expovariate(RATE_PER_S)
        await asyncio.sleep(max(due_s - loop.time(), 0))
        tasks.append(asyncio.create_task(run(idle.pop() if idle else await connect(port))))
    taken_ms = await asyncio.gather(*tasks)
    await asyncio.gather(*(client.close() for client in idle))
    return list(taken_ms)


def cases(router: BenchRouter, options: argparse.Namespace) -> None:
    print(f"{'case':40} {'us/request':>11} {'us/token':>9}")
    for case, (path, body) in CASES.items():
        us = min(measure(router, path, body, options.num_requests, options.concurrency) for _ in range(options.repeats))
        per_token = f"{us / NUM_TOKENS:9.1f}" if body["max_tokens"] > 1 else ""
        print(f"{case:40} {us:11.0f} {per_token}", flush=True)


def many_against_few(few: BenchRouter, many: BenchRouter, options: argparse.Namespace) -> float:
    """How many times the processor time of a request; both take turns."""
    path, body = CASES["completion, whole, 1 token"]
    taken = [
        [measure(each, path, body, options.num_requests, options.concurrency) for each in (few, many)]
        for _ in range(options.repeats)
    ]
    of_few, of_many = (min(column) for column in zip(*taken, strict=True))
    print(f"{FEW} workers: {of_few:.0f} us a request; {MANY}: {of_many:.0f}", flush=True)
    return of_many / of_few


def targets(model: Path, token_ids: list[int], options: argparse.Namespace) -> dict[str, float]:
    """What was measured, by the names in TARGETS."""
    latency, latency99, streams, workers = TARGETS
    found: dict[str, float] = {}
    with (
        stepping_worker(str(model), token_ids, STREAM_STEP_MS / 1e3) as record,
        bench_router([record, *prefill_records(record, FEW)]) as few,
    ):
        with bench_router([record, *prefill_records(record, MANY)]) as many:
            found[workers] = many_against_few(few, many, options)
        num_requests = max(options.num_requests * 5, 10)
        taken_ms = [uvloop.run(latencies(few.port, num_requests)) for _ in range(options.repeats)]
        found[latency], found[latency99] = (min(float(np.percentile(each, q)) for each in taken_ms) for q in (50, 99))
        num_streams = min(NUM_STREAMS, 2 * options.num_requests)
        us = min(measure(few, PATH, STREAM, num_streams, num_streams) for _ in range(options.repeats))
        found[streams] = NUM_TOKENS * 1e6 / us
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--num-requests", type=int, default=160)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder), byte_level_tokenizer())
        token_ids = ModelTokenizer(model).encode(["Hello world! How are you today? "], False)[0]
        with (
            stepping_worker(str(model), token_ids, options.step_ms / 1e3) as record,
            bench_router([record]) as router,
        ):
            cases(router, options)
        found = targets(model, token_ids, options)
    print(f"{'target':44} {'measured':>9} {'wanted':>10}")
    for name, wanted in TARGETS.items():
        is_met = found[name] >= wanted if "tokens/s" in name else found[name] <= wanted
        sign = ">=" if "tokens/s" in name else "<="
        print(f"{name:44} {found[name]:9,.1f} {sign} {wanted:7,.1f}{'' if is_met else '  missed'}", flush=True)


if __name__ == "__main__":
    main()
