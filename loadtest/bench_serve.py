"""Disaggregated against colocated on this machine: the same model, the same arrivals, two stacks, one table.

    make bench BENCHES=loadtest/bench_serve.py BENCH_ARGS="--model /models/qwen2-0.5b --rate 2 --prompt-tokens 512"

Open loop: requests leave at the times of a Poisson process, drawn from the seed, whether or not earlier ones have been
answered. Prompts are random token ids. Times are the client's, but for the handoff: that is the decode worker's own
histogram of the time from the last prefill chunk to the running batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

from loadtest.local_stack import Stack, percentile, start_stack, stop_stack


@dataclass
class Outcome:
    """One request as its client saw it; all times in seconds."""

    sent_late_s: float = 0.0
    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    error: str = ""


async def ask(client: httpx.AsyncClient, body: dict[str, object]) -> Outcome:
    outcome = Outcome()
    start = previous = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                outcome.error = (await response.aread()).decode()[:200]
                return outcome
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    outcome.error = str(chunk["error"])
                if chunk.get("choices") and chunk["choices"][0].get("token_ids"):
                    now = time.perf_counter()
                    if outcome.ttft_s:
                        outcome.gaps_s.append(now - previous)
                    else:
                        outcome.ttft_s = now - start
                    previous = now
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.total_s = time.perf_counter() - start
    return outcome


async def offer(url: str, model: str, options: argparse.Namespace) -> list[Outcome]:
    """Send the whole schedule; returns when the last answer is there."""
    rng = random.Random(options.seed)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        def body() -> dict[str, object]:
            prompt = [rng.randrange(100, options.max_token_id) for _ in range(options.prompt_tokens)]
            shape = {"max_tokens": options.output_tokens, "ignore_eos": True, "temperature": 0}
            return {"model": model, "prompt": prompt, "stream": True, "return_token_ids": True, **shape}

        for _ in range(options.warmup):
            await ask(client, body())
        start, at = time.perf_counter(), 0.0
        requests: list[tuple[float, asyncio.Task[Outcome]]] = []
        for _ in range(options.num_requests):
            at += rng.expovariate(options.rate)
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            late_s = time.perf_counter() - start - at
            requests.append((late_s, asyncio.create_task(ask(client, body()))))
        outcomes = []
        for late_s, request in requests:
            outcome = await request
            outcome.sent_late_s = late_s
            outcomes.append(outcome)
        return outcomes


def handoff_mean_s(stack: Stack) -> float | None:
    """Mean time from the last prefill chunk to the running batch, over all decode workers; None without handoffs."""
    total = count = 0.0
    for url in stack.debug_urls:
        for line in httpx.get(f"{url}/metrics").text.splitlines():
            if re.match(r'tandem:request_stage_seconds_sum\{.*stage="handoff"', line):
                total += float(line.split()[-1])
            if re.match(r'tandem:request_stage_seconds_count\{.*stage="handoff"', line):
                count += float(line.split()[-1])
    return total / count if count else None


def row(name: str, outcomes: Sequence[Outcome], handoff_s: float | None) -> str:
    good = [outcome for outcome in outcomes if not outcome.error]
    ttft = [outcome.ttft_s for outcome in good]
    gaps = [gap for outcome in good for gap in outcome.gaps_s]
    cells = [f"{percentile(ttft, 0.5) * 1e3:.0f} / {percentile(ttft, 0.9) * 1e3:.0f}"]
    cells.append(
        f"{percentile(gaps, 0.5) * 1e3:.1f} / {percentile(gaps, 0.9) * 1e3:.1f} / {percentile(gaps, 0.99) * 1e3:.1f}"
    )
    cells.append(f"{handoff_s * 1e3:.1f}" if handoff_s is not None else "-")
    cells.append(str(len(outcomes) - len(good)))
    cells.append(f"{max(outcome.sent_late_s for outcome in outcomes) * 1e3:.0f}")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="any model that `tandem up` takes; the default is the demo model")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--num-requests", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--max-token-id", type=int, default=2000, help="prompts are drawn from 100 to this")
    parser.add_argument("--warmup", type=int, default=4, help="requests before the clock starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--up-args", default="", help="further flags of `tandem up`, for every stack")
    options = parser.parse_args()
    model = ["--model", options.model] if options.model else []
    shared = [*model, "--served-model-name", "bench", *options.up_args.split()]
    stacks = {
        "disaggregated, nixl": ["--prefill", "1", "--decode", "1", "--kv-transport", "nixl"],
        "disaggregated, ucxx": ["--prefill", "1", "--decode", "1", "--kv-transport", "ucxx"],
        "colocated, 2 workers": ["--colocated", "--decode", "2"],
    }
    print(
        f"{options.num_requests} requests, {options.rate:g}/s, {options.prompt_tokens} prompt and "
        f"{options.output_tokens} output tokens, {options.model or 'demo model'}\n\n"
        "| stack | TTFT p50 / p90, ms | ITL p50 / p90 / p99, ms | handoff mean, ms | errors | latest send, ms |\n"
        "|---|---|---|---|---|---|",
        flush=True,
    )
    for name, flags in stacks.items():
        stack = start_stack(name, [*shared, *flags])
        try:
            outcomes = asyncio.run(offer(stack.url, "bench", options))
            print(row(name, outcomes, handoff_mean_s(stack)), flush=True)
        finally:
            stop_stack(stack)
    return 0


if __name__ == "__main__":
    sys.exit(main())
