"""What the router costs: latency that it adds, streamed tokens that a core carries, routing among many; targets.

    make bench-router
    python -m tests.bench.bench_router [--num-requests 160] [--concurrency 16] [--step-ms 5] [--repeats 3]

Routers in processes of their own, a worker without a model in another that gives every request its first token at once
and then one a step in one frame, as decode workers do, and this process as the client. What is counted is the routers'
processor time, the least of the repeats, so a busy machine shows little; but for the latency, which is the client's:
from a request to its first event, and beside it the worker's alone, asked without a router.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from kvstore.registry import WorkerRecord
from services.router.text import ModelTokenizer
from tests.bench.direct_worker import DirectWorker
from tests.bench.router_processes import (
    BenchRouter,
    BenchWorker,
    Client,
    bench_router,
    connect,
    prefill_records,
    stepping_worker,
)
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
NUM_CONNECTIONS = 32
TARGETS = {
    "processor time a request at 100 req/s, ms": 1.5,
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


async def latencies(ask: Callable[[], Awaitable[float]], num_requests: int) -> list[float]:
    """Milliseconds until the moment that `ask` returns: an open loop, Poisson arrivals."""
    rng, tasks = random.Random(11), list[asyncio.Task[float]]()
    due_s = time.monotonic()

    async def run() -> float:
        began_s = time.monotonic()
        return (await ask() - began_s) * 1e3

    for _ in range(num_requests):
        due_s += rng.expovariate(RATE_PER_S)
        await asyncio.sleep(max(due_s - time.monotonic(), 0))
        tasks.append(asyncio.create_task(run()))
    return list(await asyncio.gather(*tasks))


async def routed(port: int, num_requests: int) -> list[float]:
    """Through the router, to the first event."""
    idle = list[Client]()

    async def ask() -> float:
        client = idle.pop() if idle else await connect(port)
        await client.ask(PATH, {**STREAM, "max_tokens": LATENCY_TOKENS})
        idle.append(client)
        assert client.first_event_s is not None
        return client.first_event_s

    taken_ms = await latencies(ask, num_requests)
    await asyncio.gather(*(client.close() for client in idle))
    return taken_ms


async def direct(address: str, prompt: list[int], num_requests: int) -> list[float]:
    """The worker alone, to its first token."""
    async with DirectWorker(address) as worker:
        return await latencies(lambda: worker.ask(prompt, LATENCY_TOKENS), num_requests)


@dataclass
class Latencies:
    """What came of requests at a rate: through the router, and of the worker alone, in turns."""

    routed_ms: list[list[float]] = field(default_factory=list)
    alone_ms: list[list[float]] = field(default_factory=list)
    cpu_us: list[dict[str, float]] = field(default_factory=list)
    """Of a request through the router, by process."""
    idle: list[float] = field(default_factory=list)
    """Share of the machine's processors that nobody used meanwhile: without any, what is seen is a queue for them."""

    def added_ms(self, quantile: float) -> float:
        """By the router, and by waiting for a processor behind it: the difference, of the best round."""
        rounds = zip(self.routed_ms, self.alone_ms, strict=True)
        return min(float(np.percentile(routed, quantile) - np.percentile(alone, quantile)) for routed, alone in rounds)

    def show(self) -> None:
        for routed, alone, cpu_us, idle in zip(self.routed_ms, self.alone_ms, self.cpu_us, self.idle, strict=True):
            quantiles = " / ".join(f"{np.percentile(routed, q):.1f}" for q in (50, 99))
            quantiles += " ms, worker alone " + " / ".join(f"{np.percentile(alone, q):.1f}" for q in (50, 99))
            spent = ", ".join(f"{name} {us:.0f}" for name, us in cpu_us.items())
            print(f"p50 / p99 {quantiles}; us of processor a request: {spent}; idle {idle:.0%}", flush=True)


def measure_latencies(
    router: BenchRouter, worker: BenchWorker, prompt: list[int], options: argparse.Namespace
) -> Latencies:
    found, num_requests = Latencies(), max(options.num_requests * 5, 10)
    processes = {"router": router.cpu_s, "worker": worker.cpu_s, "client": time.process_time}
    for _ in range(options.repeats):
        found.alone_ms.append(uvloop.run(direct(worker.record.grpc_address, prompt, num_requests)))
        began_s = {name: cpu_s() for name, cpu_s in processes.items()}
        busy = busy_and_idle()
        found.routed_ms.append(uvloop.run(routed(router.port, num_requests)))
        spent, idle = np.array(busy_and_idle()) - busy
        found.idle.append(idle / (spent + idle))
        found.cpu_us.append({name: (cpu_s() - began_s[name]) / num_requests * 1e6 for name, cpu_s in processes.items()})
    return found


def busy_and_idle() -> tuple[int, int]:
    """Ticks of the machine's processors so far, with work (another machine's on the same processor, too) and without.
    Of Linux."""
    ticks = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, idle


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


def several(records: Sequence[WorkerRecord], options: argparse.Namespace) -> None:
    """What a second process brings, where there are processors for it, and what it costs a request."""
    num_requests, body = 2 * options.num_requests, {**STREAM, "max_tokens": LATENCY_TOKENS}
    with bench_router(records) as one, bench_router(records, num_processes=2) as two:
        for router in (one, two):
            uvloop.run(drive(router.port, PATH, body, 1, NUM_CONNECTIONS))
        rounds = [[throughput(router, body, num_requests) for router in (one, two)] for _ in range(options.repeats)]
    for number, of_rounds in zip((1, 2), zip(*rounds, strict=True), strict=True):
        per_s, us = max(each[0] for each in of_rounds), min(each[1] for each in of_rounds)
        print(f"router processes {number}: {per_s:6.0f} requests/s of {LATENCY_TOKENS} tokens, {us:5.0f} us a request")


def throughput(router: BenchRouter, body: dict[str, Any], num_requests: int) -> tuple[float, float]:
    """Requests per second, as fast as they go, and microseconds of the router for each."""
    each = max(num_requests // NUM_CONNECTIONS, 1)
    cpu_s, began_s = router.cpu_s(), time.monotonic()
    uvloop.run(drive(router.port, PATH, body, each, NUM_CONNECTIONS))
    taken_s, num_asked = time.monotonic() - began_s, each * NUM_CONNECTIONS
    return num_asked / taken_s, (router.cpu_s() - cpu_s) / num_asked * 1e6


def targets(model: Path, token_ids: list[int], options: argparse.Namespace) -> dict[str, float]:
    """What was measured, by the names in TARGETS."""
    cpu, latency, latency99, streams, workers = TARGETS
    found: dict[str, float] = {}
    with stepping_worker(str(model), token_ids, STREAM_STEP_MS / 1e3) as worker:
        records = [worker.record, *prefill_records(worker.record, FEW)]
        with bench_router(records) as few:
            with bench_router([worker.record, *prefill_records(worker.record, MANY)]) as many:
                found[workers] = many_against_few(few, many, options)
            at_rate = measure_latencies(few, worker, token_ids, options)
            at_rate.show()
            found[cpu] = min(each["router"] for each in at_rate.cpu_us) / 1e3
            found[latency], found[latency99] = at_rate.added_ms(50), at_rate.added_ms(99)
            num_streams = min(NUM_STREAMS, 2 * options.num_requests)
            us = min(measure(few, PATH, STREAM, num_streams, num_streams) for _ in range(options.repeats))
            found[streams] = NUM_TOKENS * 1e6 / us
        several(records, options)
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
            stepping_worker(str(model), token_ids, options.step_ms / 1e3) as worker,
            bench_router([worker.record]) as router,
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
