"""What a handoff costs, by stage, idle and beside running streams; what it does to these; what an idle worker takes.

    make bench-handoff
    make bench-handoff BENCH_ARGS="--repetitions 40 --lengths 512 2048 --parts idle"

One prefill worker and one decode worker of one thread each, a router and Redis. Stages are those of receipts, stamped
by the workers, from when the last chunk is computed: *read*, until its blocks are here and verified; *confirm*, until
the owner has said that they were held; *join*, until the decode worker's engine has taken them, between two steps. The
handoff beside running streams is given without the join, which waits for the step that goes on. "delta": prompts of
which the decode worker has all but the last 512 tokens.

Idle handoffs are of a random model with little arithmetic and the KV of the one of 0.39 B that all else is measured
with (12 KiB a token), so that there are many in a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import httpx
import psutil

from loadtest.send import start_stack, stop_stack
from loadtest.send.local_stack import Stack
from tests.bench.bench_model import write_bench_model
from tests.bench.handoff_client import Handoff, Streams, handed_off, percentile
from tests.hf_models import write_model

PARTS: Final = ("idle", "loaded", "cpu")
_LENGTHS: Final = (512, 1024, 2048, 4096)
_DELTA: Final = 512
_TARGETS_MS: Final = {"idle": (3.0, 8.0), "loaded": (5.0, 15.0)}
"""Of a handoff: p50, p99."""
_ARRIVING: Final = (512, 2048)
_PROMPT: Final = 128
_SETTLE_S: Final = 15.0  # after its start a worker backs its pool's memory, and NIXL sets connections up


def write_kv_model(directory: Path) -> Path:
    """A random model with the KV of the bench model, and a fiftieth of its weights."""
    return write_model(
        directory / "qwen2-kv",
        "qwen2_tied",
        dtype="bfloat16",
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )


def start(model: Path, options: argparse.Namespace) -> Stack:
    """`tandem up` with a worker of each role."""
    flags = [str(model), "--prefill", "1", "--decode", "1", "--num-threads", "1", "--max-model-len", "8192"]
    flags += ["--kv-cache-memory-bytes", "400MiB", "--kv-transport", options.transport]
    return start_stack("handoff", flags)


async def measure_idle(stack: Stack, options: argparse.Namespace) -> dict[str, list[Handoff]]:
    """Handoffs one at a time, the lengths in turns; by the row's name."""
    found: dict[str, list[Handoff]] = {}
    source = random.Random(1)
    async with httpx.AsyncClient(base_url=stack.url, timeout=300) as client:
        for number in range(options.repetitions + 1):  # the first ones find nothing warm
            for length in options.lengths:
                taken = {f"{length:,}": await handed_off(client, _tokens(source, length))}
                if length > _DELTA:
                    before = _tokens(source, length - _DELTA)
                    await handed_off(client, before)
                    taken[f"{length:,}, delta"] = await handed_off(client, before + _tokens(source, _DELTA))
                for name, handoff in taken.items():
                    found.setdefault(name, []).extend([handoff] * bool(number))
    return found


async def measure_loaded(
    stack: Stack, options: argparse.Namespace
) -> tuple[dict[str, list[Handoff]], list[list[float]]]:
    """Handoffs beside running streams, and the gaps in these in seconds: without prompts that arrive, and with them."""
    found: dict[str, list[Handoff]] = {}
    gaps: list[list[float]] = [[], []]
    source = random.Random(2)
    streaming = Streams(stack.url, options.streams, lambda: _tokens(source, _PROMPT))
    async with httpx.AsyncClient(base_url=stack.url, timeout=300) as client, streaming as streams:
        for _ in range(options.rounds):
            await asyncio.sleep(options.quiet_s)
            gaps[0] += streams.take_gaps()
            for length in _ARRIVING:
                found.setdefault(f"{length:,}", []).append(await handed_off(client, _tokens(source, length)))
            gaps[1] += streams.take_gaps()
    return found, gaps


def idle_shares(stack: Stack, seconds: float) -> Mapping[str, float]:
    """The share of a core that each worker takes while nobody asks anything."""
    time.sleep(_SETTLE_S)
    workers = {
        role: process
        for process in psutil.Process(stack.process.pid).children(recursive=True)
        for role in ("prefill", "decode")
        if f"services.{role}" in process.cmdline()
    }
    before = {role: sum(process.cpu_times()[:2]) for role, process in workers.items()}
    started_s = time.monotonic()
    time.sleep(seconds)
    passed_s = time.monotonic() - started_s
    return {role: (sum(process.cpu_times()[:2]) - before[role]) / passed_s for role, process in workers.items()}


def _tokens(source: random.Random, length: int) -> list[int]:
    return [source.randrange(100, 2000) for _ in range(length)]


def print_handoffs(found: Mapping[str, Sequence[Handoff]], which: str) -> None:
    """A row for each length, and one for all."""
    p50_ms, p99_ms = _TARGETS_MS[which]
    print(f"\nHandoffs, {which}; targets: p50 {p50_ms:g} ms, p99 {p99_ms:g} ms\n")
    print("| prompt tokens | n | blocks moved | read, ms | confirm | join | handoff, p50 | p99 |\n" + "|---" * 8 + "|")
    for name, handoffs in {**found, "all": [each for row in found.values() for each in row]}.items():
        if not handoffs:
            continue
        read, confirm, join, blocks = (
            median(getattr(each, part) for each in handoffs) for part in ("read_s", "confirm_s", "join_s", "num_blocks")
        )
        totals = [each.read_s + each.confirm_s + (each.join_s if which == "idle" else 0.0) for each in handoffs]
        stages = " | ".join(f"{stage * 1e3:.1f}" for stage in (read, confirm, join))
        ends = f"{percentile(totals, 50) * 1e3:.1f} | {percentile(totals, 99) * 1e3:.1f}"
        print(f"| {name} | {len(handoffs)} | {blocks:g} | {stages} | {ends} |", flush=True)


def print_rest(rows: Sequence[tuple[str, str, str]]) -> None:
    print("\n| what | here | target |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def summarize(found: Mapping[str, Sequence[Handoff]], gaps: Sequence[Sequence[float]]) -> list[tuple[str, str, str]]:
    """What streams and first tokens have to bear."""
    share = median(each.read_s / each.ttft_s for each in found[f"{_ARRIVING[-1]:,}"])
    quiet, loud = (percentile(each, 99) for each in gaps)
    return [
        (f"read and verified, behind the last chunk, of TTFT at {_ARRIVING[-1]:,} tokens", f"{share:.2%}", "1 %"),
        (
            f"ITL p99 of running streams while prompts of {_ARRIVING[0]:,} and {_ARRIVING[1]:,} tokens arrive",
            f"{loud * 1e3:.1f} ms, {loud / quiet:.2f}x of {quiet * 1e3:.1f} ms without ({len(gaps[1]):,} gaps)",
            "1.2x",
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", type=Path, help="a Hugging Face directory, for all parts")
    parser.add_argument("--transport", default="auto", choices=("auto", "nixl", "ucxx"))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(_LENGTHS))
    parser.add_argument("--repetitions", type=int, default=10, help="idle handoffs of each length")
    parser.add_argument("--streams", type=int, default=8, help="that run beside the handoffs of the part `loaded`")
    parser.add_argument("--rounds", type=int, default=6, help="of that part")
    parser.add_argument(
        "--quiet-s", type=float, default=5.0, help="for which no prompt arrives in each of these rounds"
    )
    options = parser.parse_args()
    rest: list[tuple[str, str, str]] = []
    with tempfile.TemporaryDirectory() as directory:
        if {"idle", "cpu"} & set(options.parts):
            stack = start(options.model or write_kv_model(Path(directory)), options)
            try:
                if "cpu" in options.parts:
                    shares = idle_shares(stack, 10.0)
                    rest += [
                        (f"idle {name} worker, of a core", f"{share:.1%}", "1 %") for name, share in shares.items()
                    ]
                if "idle" in options.parts:
                    print_handoffs(asyncio.run(measure_idle(stack, options)), "idle")
            finally:
                stop_stack(stack)
        if "loaded" in options.parts:
            stack = start(options.model or write_bench_model(Path(directory)), options)
            try:
                found, gaps = asyncio.run(measure_loaded(stack, options))
            finally:
                stop_stack(stack)
            print_handoffs(found, "loaded")
            rest += summarize(found, gaps)
    if rest:
        print_rest(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
