"""Measures what routing by prefix is worth: one trace, one stack per routing policy, one table.

    make bench-prefix TRACE=mooncake_conversation.jsonl
    make bench-prefix                                     # conversations made up by conversations.py

Lengths are scaled: a trace block becomes `--tokens-per-block` tokens. The hit rate is prompt tokens not computed over
prompt tokens, as usage reports them; the first row is what one shared cache without bounds would have, in whole blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx

from loadtest.figures import Spread
from loadtest.plan import BLOCK_TOKENS, PromptMaker, Scale, read_mooncake
from loadtest.send import start_stack, stop_stack
from tests.bench.conversations import infinite_cache_hits, make_conversations

_POLICIES = ("kv", "prefix-hash", "least-loaded", "round-robin")
_BLOCK_SIZE = 32


async def replay(
    url: str, prompts: list[list[int]], times_s: list[float], output_tokens: int
) -> tuple[list[float], int, int]:
    """Send every prompt at its time. Returns times to first token, prompt tokens not computed, and errors."""
    ttft_s: list[float] = []
    num_cached = num_errors = 0
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def ask(prompt: list[int]) -> None:
            nonlocal num_cached, num_errors
            body = {"model": "bench", "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True}
            body |= {"temperature": 0, "receipt": True}
            response = await client.post("/v1/completions", json=body)
            if response.status_code != 200:
                num_errors += 1
                return
            answer = response.json()
            num_cached += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            stamps = answer["receipt"]["sequences"][0]["unix_seconds"]
            ttft_s.append(stamps["first_token"] - stamps["arrived"])

        start = time.perf_counter()
        tasks = []
        for prompt, at_s in zip(prompts, times_s, strict=True):
            await asyncio.sleep(max(0.0, start + at_s - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(prompt)))
        await asyncio.gather(*tasks)
    return ttft_s, num_cached, num_errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a Mooncake JSONL file; without one a trace is made up")
    parser.add_argument("--num-requests", type=int, default=200)
    parser.add_argument(
        "--rate", type=float, default=5.0, help="mean requests per second; the trace is stretched to it"
    )
    parser.add_argument("--tokens-per-block", type=int, default=32)
    parser.add_argument("--max-prompt-tokens", type=int, default=3000)
    parser.add_argument("--output-tokens", type=int, default=8)
    parser.add_argument("--policies", nargs="+", default=list(_POLICIES), choices=_POLICIES)
    parser.add_argument("--up-args", default="--prefill 2 --decode 2", help="flags of `tandem up` for every stack")
    options = parser.parse_args()
    requests = read_mooncake(options.trace, options.num_requests) if options.trace else None
    requests = requests or make_conversations(options.num_requests, seed=0)
    # Whole blocks, the last one too: what routing is worth shows in blocks.
    scale = Scale(options.tokens_per_block / BLOCK_TOKENS, options.max_prompt_tokens, options.output_tokens)
    maker = PromptMaker(scale, range(100, 2000), seed=0)
    prompts = [maker.tokens(replace(each, input_length=len(each.block_ids) * BLOCK_TOKENS)) for each in requests]
    # Arrivals of the trace have a coarse clock: spread them within it, then stretch all to the rate.
    rng = random.Random(0)
    times_s = sorted(each.at_s + rng.random() * 3 for each in requests)
    scale = len(requests) / options.rate / max(1e-9, times_s[-1] - times_s[0])
    times_s = [(at_s - times_s[0]) * scale for at_s in times_s]
    num_tokens = sum(map(len, prompts))
    print(
        f"{len(prompts)} requests, {options.rate:g}/s, {num_tokens / len(prompts):.0f} prompt tokens on average, "
        f"{options.trace.name if options.trace else 'made-up conversations'}, {options.up_args}\n\n"
        "| policy | hit rate | TTFT p50 / p90, ms | errors |\n|---|---|---|---|\n"
        f"| (infinite shared cache) | {infinite_cache_hits(prompts, _BLOCK_SIZE) / num_tokens:.1%} | | |",
        flush=True,
    )
    for policy in options.policies:
        flags = ["--served-model-name", "bench", "--routing-policy", policy, *options.up_args.split()]
        stack = start_stack(policy, flags)
        try:
            ttft_s, num_cached, num_errors = asyncio.run(replay(stack.url, prompts, times_s, options.output_tokens))
        finally:
            stop_stack(stack)
        ttft = Spread.of(ttft_s)
        times = "-" if ttft.p50 is None or ttft.p90 is None else f"{ttft.p50 * 1e3:.0f} / {ttft.p90 * 1e3:.0f}"
        print(f"| {policy} | {num_cached / num_tokens:.1%} | {times} | {num_errors} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
