"""Decode steps and prefill of one engine: C kernels, in bfloat16 and int8, and torch; beside the machine's floors.

    make bench-engine
    python -m tests.bench.bench_engine --model /models/qwen2-0.5b --num-threads 2 --repetitions 9

Without --model: a random Qwen2 (24 layers, hidden 896, 14 query and 2 KV heads, 0.39 B parameters). Times are medians.
All runs of a row take turns, so that what else the machine does falls on each of them alike; compare within a row.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from services.engine.forward import ForwardBatch
from services.engine.kernels.choice import choose_kernels
from services.engine.kernels.library import Epilogue, KernelLibrary, Workspace
from services.engine.kernels.projection import Projection
from services.engine.model import LoadedModel, load_model
from tests.bench.bench_model import write_bench_model

_BLOCK_SIZE = 32
_CHUNK = 512  # tokens of a prefill step, as workers take by default
DECODE = [(batch, context) for context in (64, 1024, 4096) for batch in (1, 8, 32)]
PREFILL = (256, 2048, 4096)


@dataclass
class Column:
    """One way to compute, with its own model and cache."""

    name: str
    model: LoadedModel
    kv_cache: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a bfloat16 model; default: a random one of 0.39 B parameters")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="no context of 4,096 tokens")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or str(write_bench_model(Path(directory)))
        contexts = 1024 if arguments.quick else 4096
        columns = [
            _column("kernels bf16", model, contexts, arguments.num_threads),
            _column("kernels int8", model, contexts, arguments.num_threads, quantization="int8"),
            _column("torch bf16", model, contexts, arguments.num_threads, cpu_kernels="torch"),
        ]
        floors = _floors(arguments.num_threads)
        print(f"\nkernels: {choose_kernels().reason}; {arguments.num_threads} thread(s); medians of", end=" ")
        print(f"{arguments.repetitions}; DRAM {floors.dram_gb_per_s:.1f} GB/s,", end=" ")
        print(f"peak bf16 {floors.bf16_gflops:.0f} and int8 {floors.int8_gflops:.0f} G operations/s\n")
        _print_decode(columns, floors, contexts, arguments.repetitions)
        _print_prefill(columns, floors, contexts, arguments.repetitions)


def _column(name: str, model: str, contexts: int, num_threads: int, **settings: str) -> Column:
    started = time.perf_counter()
    loaded = load_model(model, num_threads=num_threads, **settings)  # type: ignore[arg-type]
    print(f"{name}: loaded in {time.perf_counter() - started:.1f} s", flush=True)
    num_blocks = max(batch * -(-context // _BLOCK_SIZE) for batch, context in DECODE if context <= contexts)
    return Column(name, loaded, loaded.new_kv_cache(num_blocks, _BLOCK_SIZE))


def make_batch(batch: int, context: int, num_new: int, vocab_size: int) -> ForwardBatch:
    """The last `num_new` tokens of `batch` sequences of `context` tokens; logits of the last one each."""
    blocks_each = -(-context // _BLOCK_SIZE)
    generator = torch.Generator().manual_seed(batch + context)
    tables = torch.randperm(batch * blocks_each, generator=generator).view(batch, blocks_each).to(torch.int32)
    positions = torch.arange(context - num_new, context).repeat(batch, 1)
    slots = tables.gather(1, positions // _BLOCK_SIZE).long() * _BLOCK_SIZE + positions % _BLOCK_SIZE
    return ForwardBatch(
        token_ids=torch.randint(3, vocab_size, (batch * num_new,), generator=generator),
        positions=positions.flatten(),
        slot_mapping=slots.flatten(),
        query_start=list(range(0, batch * num_new + 1, num_new)),
        context_lens=[context] * batch,
        block_tables=tables,
        logits_indices=torch.arange(num_new - 1, batch * num_new, num_new),
    )


def _print_decode(columns: list[Column], floors: Floors, contexts: int, repetitions: int) -> None:
    print("| decode step | " + " | ".join(f"{c.name}, ms" for c in columns) + " | DRAM floor bf16 / int8, ms |")
    print("|---|" + "---|" * (len(columns) + 1))
    for num_sequences, context in DECODE:
        if context > contexts:
            continue
        batch = make_batch(num_sequences, context, 1, columns[0].model.config.vocab_size)
        times = _medians([partial(c.model.forward, batch, c.kv_cache) for c in columns], repetitions)
        floor = [floors.decode_ms(columns[0].model, num_sequences, context, size) for size in (2, 1)]
        cells = " | ".join(f"{1e3 * t:.1f}" for t in times)
        print(f"| B = {num_sequences}, context {context:,} | {cells} | {floor[0]:.1f} / {floor[1]:.1f} |", flush=True)


def _print_prefill(columns: list[Column], floors: Floors, contexts: int, repetitions: int) -> None:
    print("\n| prefill | " + " | ".join(f"{c.name}, tok/s" for c in columns) + " | share of peak, bf16 / int8 |")
    print("|---|" + "---|" * (len(columns) + 1))
    for length in PREFILL:
        if length > max(contexts, 2048):
            continue

        times = _medians([partial(_prefill, column, length) for column in columns], max(1, repetitions // 2))
        work = _operations(columns[0].model, length)
        shares = (work / times[0] / 1e9 / floors.bf16_gflops, work / times[1] / 1e9 / floors.int8_gflops)
        cells = " | ".join(f"{length / t:,.0f}" for t in times)
        print(f"| {length:,} tokens | {cells} | {shares[0]:.0%} / {shares[1]:.0%} |", flush=True)


def _prefill(column: Column, length: int) -> None:
    for start in range(0, length, _CHUNK):
        end = min(length, start + _CHUNK)
        batch = make_batch(1, end, end - start, column.model.config.vocab_size)
        column.model.forward(batch, column.kv_cache)


def _medians(runs: list[Callable[[], object]], repetitions: int) -> list[float]:
    """Median seconds of each run; they take turns, after one each to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for repetition in range(repetitions + 1):
        for run, seconds in zip(runs, times, strict=True):
            started = time.perf_counter()
            run()
            if repetition > 0:
                seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in times]


@dataclass(frozen=True)
class Floors:
    """What the machine can do at best, measured here and now with as many threads."""

    dram_gb_per_s: float
    bf16_gflops: float
    int8_gflops: float

    def decode_ms(self, model: LoadedModel, num_sequences: int, context: int, weight_bytes: int) -> float:
        """A decode step reads every layer's weights once (`weight_bytes` each), the output projection's, and the KV."""
        layers, head = _num_weights(model)
        kv_bytes = model.block_layout(_BLOCK_SIZE).block_bytes / _BLOCK_SIZE * num_sequences * context
        return (layers * weight_bytes + head * 2 + kv_bytes) / self.dram_gb_per_s / 1e6


def _num_weights(model: LoadedModel) -> tuple[int, int]:
    config = model.config
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.hidden_size
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * (attention + mlp), config.vocab_size * config.hidden_size


def _operations(model: LoadedModel, length: int) -> float:
    """Of a prefill: projections, and attention's two products below the diagonal."""
    config = model.config
    attention = config.num_layers * config.num_heads * config.head_dim * 2 * length * length
    return 2.0 * _num_weights(model)[0] * length + attention


def _floors(num_threads: int) -> Floors:
    library = choose_kernels().library
    bf16, int8 = (0.0, 0.0) if library is None else (_peak(library, int8, num_threads) for int8 in (False, True))
    return Floors(_dram_gb_per_s(num_threads), bf16, int8)


def _dram_gb_per_s(num_threads: int) -> float:
    """Sum 512 MiB, the best of five."""
    data = torch.ones(64 << 20, dtype=torch.int64)
    best = min(_seconds(lambda: data.sum()) for _ in range(5))
    return data.nbytes / best / 1e9


def _peak(library: KernelLibrary, int8: bool, num_threads: int) -> float:
    """The kernels' own product of 32 rows and weights that L2 holds, the best of 200: as fast as they can be fed."""
    weight = torch.randn(256 * num_threads, 512).bfloat16()
    projection = Projection(library, weight, None, int8=int8)
    x, y = torch.randn(32, 512).bfloat16(), torch.empty((32, len(weight)), dtype=torch.bfloat16)
    workspace = Workspace()
    best = min(_seconds(lambda: projection(x, y, Epilogue.WRITE, workspace, num_threads)) for _ in range(200))
    return 2 * x.shape[0] * weight.numel() / best / 1e9


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
