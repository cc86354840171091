"""Decode steps and prefill of one engine: C kernels, in bfloat16 and int8, and torch; beside the machine's floors.

    make bench-engine
    python -m tests.bench.bench_engine --model /models/qwen2-0.5b --num-threads 2 --repetitions 9
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m tests.bench.bench_engine --cpu-kernels avx2

Without --model: a random Qwen2 (24 layers, hidden 896, 14 query and 2 KV heads, 0.39 B parameters). Times are medians.
All runs of a row take turns, so that what else the machine does falls on each of them alike; compare within a row.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from services.engine.cpu_kernels import REQUIRED_FLAGS
from services.engine.native.attention.forward import ForwardBatch
from services.engine.native.kernels.choice import choose_kernels
from services.engine.native.kernels.library import KernelLibrary
from services.engine.native.model.linear import cpu_has_bfloat16
from services.engine.native.model.model import LoadedModel, load_model
from tests.bench.bench_model import write_bench_model

_BLOCK_SIZE = 32
CHUNK = 512  # tokens of a prefill step, as workers take by default
DECODE = [(batch, context) for context in (64, 1024, 4096) for batch in (1, 8, 32)]
PREFILL = (256, 2048, 4096)

Run = Callable[[], float]
"""Computes once and returns the seconds that it took."""


class Column(Protocol):
    """One way to compute. Both methods make ready and return what is timed."""

    @property
    def name(self) -> str: ...

    def decode(self, num_sequences: int, context: int) -> Run: ...

    def prefill(self, length: int) -> Run: ...


@dataclass(frozen=True)
class EngineColumn:
    """Our model with a cache of its own. A run is `forward`: from batches at hand to logits."""

    name: str
    model: LoadedModel
    kv_cache: Tensor

    def decode(self, num_sequences: int, context: int) -> Run:
        return self._run([make_batch(num_sequences, context, 1, self.model.config.vocab_size)])

    def prefill(self, length: int) -> Run:
        return self._run(prefill_batches(length, self.model.config.vocab_size))

    def _run(self, batches: list[ForwardBatch]) -> Run:
        return lambda: sum(_seconds(partial(self.model.forward, batch, self.kv_cache)) for batch in batches)


@dataclass(frozen=True)
class Rows:
    """What is measured: decode steps of so many sequences and tokens of context, prompts of so many tokens."""

    decode: list[tuple[int, int]]
    prefill: list[int]

    @classmethod
    def select(cls, quick: bool, text: str) -> Rows:
        """Those whose name contains `text`; `quick`: without decode steps and prompts of 4,096 tokens."""
        longest = 2048 if quick else 4096
        rows = cls(
            [shape for shape in DECODE if shape[1] <= longest and text in decode_name(*shape)],
            [length for length in PREFILL if length <= longest and text in prefill_name(length)],
        )
        if not rows.decode and not rows.prefill:
            raise SystemExit(f"no row is named like {text!r}")
        return rows

    @property
    def num_tokens(self) -> int:
        """The most that lie in a cache at once."""
        return max([batch * context for batch, context in self.decode] + self.prefill)


def decode_name(num_sequences: int, context: int) -> str:
    return f"B = {num_sequences}, context {context:,}"


def prefill_name(length: int) -> str:
    return f"{length:,} tokens"


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--profile", action="store_true", help="also where the time of each row goes")
    arguments = parser.parse_args()
    rows = Rows.select(arguments.quick, arguments.rows)
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or str(write_bench_model(Path(directory)))
        columns = engine_columns(model, rows.num_tokens, arguments)
        floors = measure_floors(arguments)
        print_conditions(floors, arguments)
        decode_table(columns, columns[0].model, floors, rows, arguments.repetitions)
        prefill_table(columns, columns[0].model, floors, rows, arguments.repetitions)
        if arguments.profile:
            for column in columns:
                profile_table(column, rows, arguments.repetitions)


def argument_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a bfloat16 model; default: a random one of 0.39 B parameters")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument(
        "--cpu-kernels", default="auto", help="which of them: as the workers' flag", choices=("auto", *REQUIRED_FLAGS)
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="no context and no prompt of 4,096 tokens")
    parser.add_argument("--rows", default="", help='only rows whose name contains this, e.g. "context 64"')
    return parser


def engine_columns(model: str, num_tokens: int, arguments: argparse.Namespace) -> list[EngineColumn]:
    """With room for `num_tokens` in each cache: the C kernels in bfloat16 and int8, if they run here, and torch."""
    columns = []
    num_threads, kernels = arguments.num_threads, arguments.cpu_kernels
    if choose_kernels(kernels).library is not None:
        for name, quantization in (("kernels bf16", "none"), ("kernels int8", "int8")):
            column = _engine_column(
                name, model, num_tokens, num_threads, quantization=quantization, cpu_kernels=kernels
            )
            columns.append(column)
    torch_name = "torch bf16" if cpu_has_bfloat16() else "torch fp32"
    return [*columns, _engine_column(torch_name, model, num_tokens, num_threads, cpu_kernels="torch")]


def _engine_column(name: str, model: str, num_tokens: int, num_threads: int, **settings: str) -> EngineColumn:
    started = time.perf_counter()
    loaded = load_model(model, num_threads=num_threads, **settings)  # type: ignore[arg-type]
    print(f"{name}: loaded in {time.perf_counter() - started:.1f} s", flush=True)
    kv_cache = loaded.new_kv_cache(-(-num_tokens // _BLOCK_SIZE), _BLOCK_SIZE)
    kv_cache.copy_(torch.randn(kv_cache.shape[1:]))  # the same in each block: what a context might have left
    return EngineColumn(name, loaded, kv_cache)


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


def prefill_batches(length: int, vocab_size: int) -> list[ForwardBatch]:
    """The steps of one prompt."""
    ends = [min(length, start + CHUNK) for start in range(0, length, CHUNK)]
    return [make_batch(1, end, end - start, vocab_size) for start, end in zip([0, *ends], ends, strict=False)]


def print_conditions(floors: Floors, arguments: argparse.Namespace) -> None:
    reason = choose_kernels(arguments.cpu_kernels).reason
    print(f"\nkernels: {reason}; {arguments.num_threads} thread(s); medians of {arguments.repetitions};", end=" ")
    peaks = " and ".join(f"{peak:.0f}" for peak in floors.gflops) or "unknown"
    print(f"DRAM {floors.dram_gb_per_s:.1f} GB/s, peak bf16 and int8 {peaks} G operations/s\n")


def decode_table(
    columns: Sequence[Column], model: LoadedModel, floors: Floors, rows: Rows, repetitions: int
) -> dict[str, list[float]]:
    """Print it; return each row's medians in seconds."""
    if not rows.decode:
        return {}
    print("| decode step | " + " | ".join(f"{c.name}, ms" for c in columns) + " | DRAM floor bf16 / int8, ms |")
    print("|---|" + "---|" * (len(columns) + 1))
    measured = {}
    for num_sequences, context in rows.decode:
        times = _medians([column.decode(num_sequences, context) for column in columns], repetitions)
        floor = [floors.decode_ms(model, num_sequences, context, size) for size in (2, 1)]
        name = decode_name(num_sequences, context)
        cells = " | ".join(f"{1e3 * t:,.1f}" for t in times)
        print(f"| {name} | {cells} | {floor[0]:.1f} / {floor[1]:.1f} |", flush=True)
        measured[name] = times
    print()
    return measured


def prefill_table(
    columns: Sequence[Column], model: LoadedModel, floors: Floors, rows: Rows, repetitions: int
) -> dict[str, list[float]]:
    """Print it; return each row's medians in seconds. Columns come in the order of the floors' peaks."""
    if not rows.prefill:
        return {}
    print("| prefill | " + " | ".join(f"{c.name}, tok/s" for c in columns) + " | share of peak, bf16 / int8 |")
    print("|---|" + "---|" * (len(columns) + 1))
    measured = {}
    for length in rows.prefill:
        times = _medians([column.prefill(length) for column in columns], max(1, repetitions // 2))
        work = _operations(model, length)
        shares = [f"{work / t / 1e9 / peak:.0%}" for t, peak in zip(times, floors.gflops, strict=False)]
        cells = " | ".join(f"{length / t:,.0f}" for t in times)
        print(f"| {prefill_name(length)} | {cells} | {' / '.join(shares)} |", flush=True)
        measured[prefill_name(length)] = times
    print()
    return measured


def profile_table(column: EngineColumn, rows: Rows, repetitions: int) -> None:
    """Print what each stage of a row takes, on average; nothing where the stages are not counted."""
    stages = list(column.model.stage_seconds)
    if not stages:
        return
    print(f"| {column.name}, ms | " + " | ".join(stages) + " |")
    print("|---|" + "---|" * len(stages))
    for name, run in [
        *((decode_name(*shape), column.decode(*shape)) for shape in rows.decode),
        *((prefill_name(length), column.prefill(length)) for length in rows.prefill),
    ]:
        run()
        before = column.model.stage_seconds
        for _ in range(repetitions):
            run()
        after = column.model.stage_seconds
        cells = " | ".join(f"{1e3 * (after[stage] - before[stage]) / repetitions:,.1f}" for stage in stages)
        print(f"| {name} | {cells} |", flush=True)
    print()


def _medians(runs: list[Run], repetitions: int) -> list[float]:
    """Median seconds of each run; they take turns, after one each to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for repetition in range(repetitions + 1):
        for run, seconds in zip(runs, times, strict=True):
            took_s = run()
            if repetition > 0:
                seconds.append(took_s)
    return [statistics.median(seconds) for seconds in times]


@dataclass(frozen=True)
class Floors:
    """What the machine can do at best, measured here and now with as many threads."""

    dram_gb_per_s: float
    gflops: list[float]  # of the kernels, bfloat16 and int8; none without kernels

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


def measure_floors(arguments: argparse.Namespace) -> Floors:
    library, num_threads = choose_kernels(arguments.cpu_kernels).library, arguments.num_threads
    peaks = [] if library is None else [_peak(library, int8, num_threads) for int8 in (False, True)]
    return Floors(_dram_gb_per_s(num_threads), peaks)


def _dram_gb_per_s(num_threads: int) -> float:
    """Sum 512 MiB, the best of five."""
    data = torch.ones(64 << 20, dtype=torch.int64)
    best = min(_seconds(lambda: data.sum()) for _ in range(5))
    return data.nbytes / best / 1e9


def _peak(library: KernelLibrary, int8: bool, num_threads: int) -> float:
    """The kernels' own product of operands in L1, on all threads at once, the best of 20: they wait for nothing."""
    with ThreadPoolExecutor(num_threads) as threads:

        def multiply() -> float:
            return sum(threads.map(lambda _: library.multiply_at_peak(int8, 5000), range(num_threads)))

        operations = multiply()
        return operations / min(_seconds(multiply) for _ in range(20)) / 1e9


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
