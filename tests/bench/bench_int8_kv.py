"""What `--kv-cache-dtype int8` costs in exactness and gives in memory, beside the model's dtype; and decode steps.

    python -m tests.bench.bench_int8_kv
    python -m tests.bench.bench_int8_kv --only steps --num-threads 2

Random models flatter it: a row's step is a 127th of its largest number, and keys of trained models have a few channels
far larger than the rest (KIVI, https://arxiv.org/abs/2402.02750, figure 2). So two channels of each key head are made
larger by a factor, and the queries' smaller by the same: the same function, with other keys. Attention: random keys,
values and queries, scores with a deviation of 4, so that heads look at few tokens. Model: a random Qwen3 of 8 layers
over random tokens; logits of the last 256 before each context. The cache in bfloat16 is what it is compared with.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div

from services.engine.native.attention.int8_rows import quantized
from services.engine.native.kernels.choice import choose_kernels
from services.engine.native.kernels.library import KernelLibrary
from services.engine.native.model.model import LoadedModel, load_model
from tests.bench.bench_engine import CHUNK, EngineColumn
from tests.bench.bench_model import write_bench_model
from tests.engine_model.paged_run import PagedRun, Sequenced
from tests.hf_models import random_prompts, write_model
from tests.kernels.paged import PagedCase

_BLOCK_SIZE = 32
_HEAD_DIM = 64
_OUTLIERS = (5, 5 + _HEAD_DIM // 2)  # channels that rotary embedding turns into each other
_FACTORS = (1, 10, 30)
_CONTEXTS = (256, 1024, 4096)
_SCORES_DEVIATION = 4.0
_JUDGED = 256  # positions before each context
_STEPS = [(batch, context) for context in (1024, 4096) for batch in (1, 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("error", "steps"), help="one of the tables")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    library = choose_kernels().library
    if library is None:
        raise SystemExit(f"the bench is of the CPU kernels, and here computes {choose_kernels().reason}")
    print(f"kernels: {library.name}; {arguments.num_threads} thread(s)\n")
    with tempfile.TemporaryDirectory() as directory:
        if arguments.only != "steps":
            _print_errors(library, Path(directory))
        if arguments.only != "error":
            _print_steps(Path(directory), arguments.num_threads, arguments.repetitions)


def _print_errors(library: KernelLibrary, directory: Path) -> None:
    print("| outliers in keys | context | attention's error, largest | mean | KL, mean | same greedy token |")
    print("|---|---|---|---|---|---|")
    for factor in _FACTORS:
        of_model = _of_model(directory / f"by-{factor}", factor)
        for context in _CONTEXTS:
            largest, mean = _of_attention(library, factor, context)
            kl, same = next(of_model)
            print(
                f"| {factor}x | {context:,} | {largest:.3f} | {mean:.4f} | {kl:.5f} | {100 * same:.1f} % |", flush=True
            )
    print()


def _of_attention(library: KernelLibrary, factor: int, context: int) -> tuple[float, float]:
    """Largest and mean difference of outputs, as shares of their deviation."""
    case = PagedCase([(context, 64)], num_heads=14, head_dim=_HEAD_DIM, block_size=_BLOCK_SIZE)
    case.cache[:, :, 0, ..., _OUTLIERS] *= factor
    case.q *= _SCORES_DEVIATION
    case.q[..., _OUTLIERS] /= factor
    in_codes = copy.copy(case)
    in_codes.cache = quantized(case.cache)
    expected = case.attend(library).float()
    error = (in_codes.attend(library).float() - expected).abs() / expected.std()
    return float(error.max()), float(error.mean())


def _of_model(directory: Path, factor: int) -> Iterator[tuple[float, float]]:
    """Before each context: how far apart the next tokens' distributions are, how often the likeliest is the same."""
    path = write_model(
        directory,
        "qwen3",
        dtype="bfloat16",
        head_dim=_HEAD_DIM,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=8192,
    )
    _enlarge(path / "model.safetensors", factor)
    (text,) = random_prompts([max(_CONTEXTS)], seed=7)
    exact, kept = (_logits(load_model(str(path), kv_cache_dtype=dtype), text) for dtype in ("auto", "int8"))
    for context in _CONTEXTS:
        ours, theirs = (logits[context - _JUDGED : context].log_softmax(-1) for logits in (kept, exact))
        kl = kl_div(ours, theirs, log_target=True, reduction="batchmean")
        yield float(kl), float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())


def _enlarge(file: Path, factor: int) -> None:
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("k_norm.weight"):
            tensor[list(_OUTLIERS)] *= factor
        elif name.endswith("q_norm.weight"):
            tensor[list(_OUTLIERS)] /= factor
    save_file(tensors, file, metadata={"format": "pt"})


def _logits(model: LoadedModel, text: list[int]) -> Tensor:
    run = PagedRun(model, num_blocks=-(-len(text) // _BLOCK_SIZE), block_size=_BLOCK_SIZE)
    sequence = Sequenced()
    return torch.cat([run.step([(sequence, text[i : i + CHUNK])])[0] for i in range(0, len(text), CHUNK)])


def _print_steps(directory: Path, num_threads: int, repetitions: int) -> None:
    path = str(write_bench_model(directory))
    num_blocks = max(batch * context for batch, context in _STEPS) // _BLOCK_SIZE
    columns = []
    for dtype in ("auto", "int8"):
        model = load_model(path, num_threads=num_threads, kv_cache_dtype=dtype)
        cache = model.new_kv_cache(num_blocks, _BLOCK_SIZE)
        random = torch.randn((*cache.shape[1:-1], model.config.head_dim), generator=torch.Generator().manual_seed(0))
        cache.copy_(quantized(random) if dtype == "int8" else random)  # the same in each block
        columns.append(EngineColumn(dtype, model, cache))
        block_bytes = model.block_layout(_BLOCK_SIZE).block_bytes
        print(f"{dtype}: {block_bytes // _BLOCK_SIZE:,} bytes a token, {64 * block_bytes:,} in a handoff of 2,048")
    print("\n| decode step | auto, ms | int8, ms | int8 / auto | attention: auto, ms | int8, ms |")
    print("|---|---|---|---|---|---|")
    for batch, context in _STEPS:
        runs = [column.decode(batch, context) for column in columns]
        steps: list[list[float]] = [[], []]
        attention: list[list[float]] = [[], []]
        for repetition in range(repetitions + 1):
            for i, run in enumerate(runs):  # by turns, so that what else the machine does falls on both
                before = columns[i].model.stage_seconds["attention"]
                took_s = run()
                if repetition:
                    steps[i].append(1e3 * took_s)
                    attention[i].append(1e3 * (columns[i].model.stage_seconds["attention"] - before))
        plain, int8 = map(statistics.median, steps)
        ratio = statistics.median(ours / theirs for theirs, ours in zip(*steps, strict=True))
        stages = " | ".join(f"{statistics.median(each):.1f}" for each in attention)
        print(f"| B = {batch}, context {context:,} | {plain:.1f} | {int8:.1f} | {ratio:.2f} | {stages} |", flush=True)


if __name__ == "__main__":
    main()
