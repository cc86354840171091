"""The engine's bench with vLLM beside it: the same model, prompts, chunks, threads and processors, in one run.

    make bench-peer
    make bench-peer BENCH_ARGS='--repetitions 9 --rows "context 64"'
    make bench-peer BENCH_ARGS='--cpu-kernels avx2'

vLLM's CPU build gets an environment of its own under build/compat and runs as its users would on a CPU without
compilation: eager, bfloat16, OpenMP preloaded. All columns take turns, in two processes, of which one waits.

With our AVX2 kernels, vLLM, its oneDNN and torch are kept to AVX2 as well, whatever the processor has. There bfloat16
has no instructions of its own and float32 may be faster: vLLM runs in both, and ratios are to the faster of a row.

What is timed, of both: from inputs at hand to logits, attention's metadata included. Not timed: scheduling, making the
inputs, sampling. vLLM's whole engine step, which has all of these, is a column of its own. Decode steps find random
keys and values in the cache, and vLLM's contexts grow by a token with each repetition.
"""

from __future__ import annotations

import argparse
import operator
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from services.engine.native.kernels.choice import choose_kernels
from tests.bench.bench_engine import (
    Column,
    EngineColumn,
    Rows,
    argument_parser,
    decode_name,
    decode_table,
    engine_columns,
    make_batch,
    measure_floors,
    prefill_name,
    prefill_table,
    print_conditions,
)
from tests.bench.bench_model import write_bench_model
from tests.bench.step_process import StepProcessFailed
from tests.bench.vllm_peer import CHECKED_TOKENS, VllmColumn, preloaded, vllm_column
from tests.compat import vllm_bench
from tests.compat.tool import ToolFailed

_KERNELS_BF16, _KERNELS_INT8, _VLLM = 0, 1, 3  # places of columns; vLLM's go on to the end, each with its whole engine
# Of the logits' deviation. Rounding made 1.4 % of difference where both were 1.2 % away from float32.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Target:
    """What our kernels are meant to reach: of vLLM's time at most, in a decode step; of its tokens/s at least."""

    row: str
    column: int
    ratio: float


TARGETS = (
    Target(decode_name(1, 64), _KERNELS_BF16, 0.62),
    Target(decode_name(8, 64), _KERNELS_BF16, 0.65),
    Target(decode_name(32, 64), _KERNELS_BF16, 0.62),
    Target(decode_name(8, 1024), _KERNELS_BF16, 0.68),
    Target(decode_name(32, 1024), _KERNELS_BF16, 0.72),
    Target(decode_name(1, 64), _KERNELS_INT8, 0.36),
    Target(decode_name(8, 64), _KERNELS_INT8, 0.40),
    Target(decode_name(32, 64), _KERNELS_INT8, 0.40),
    Target(prefill_name(256), _KERNELS_BF16, 1.8),
    Target(prefill_name(2048), _KERNELS_BF16, 1.8),
    Target(prefill_name(4096), _KERNELS_BF16, 1.6),
)
AVX2_TARGETS = (
    Target(decode_name(1, 64), _KERNELS_BF16, 0.6),
    Target(decode_name(8, 64), _KERNELS_BF16, 0.6),
    Target(decode_name(32, 64), _KERNELS_BF16, 0.7),
    Target(prefill_name(256), _KERNELS_BF16, 1.2),
    Target(prefill_name(2048), _KERNELS_BF16, 1.2),
    Target(prefill_name(4096), _KERNELS_BF16, 1.2),
)


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--torch-index", default="", help="where the environment's torch comes from")
    arguments = parser.parse_args()
    rows = Rows.select(arguments.quick, arguments.rows)
    try:
        vllm_bench.install(arguments.torch_index)
    except ToolFailed as error:
        raise SystemExit(f"vLLM cannot be installed, so there is nothing to compare with: {error}") from error
    processors = _pin(arguments.num_threads)
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or str(write_bench_model(Path(directory)))
        ours = engine_columns(model, max(rows.num_tokens, CHECKED_TOKENS + 1), arguments)
        library = choose_kernels(arguments.cpu_kernels).library
        avx2 = library is not None and library.name == "avx2"
        try:
            with ExitStack() as processes:
                peers = [
                    processes.enter_context(
                        vllm_column(ours[0].model, rows, arguments.repetitions, arguments.num_threads, dtype, avx2)
                    )
                    for dtype in (("bfloat16", "float32") if avx2 else ("bfloat16",))
                ]
                libraries = " and ".join(Path(library).name for library in preloaded()) or "nothing"
                limit = ", kept to AVX2" if avx2 else ""
                print(f"vLLM {vllm_bench.TOOL.version}{limit}, {libraries} preloaded; all on processors {processors}")
                for peer in peers:
                    _check_logits(ours[0], peer)
                has_targets = not arguments.model and arguments.num_threads == 1
                targets = AVX2_TARGETS if avx2 else TARGETS
                _measure(ours, peers, rows, arguments, targets if has_targets else ())
        except StepProcessFailed as error:
            raise SystemExit(f"vLLM: {error}") from error


def _measure(
    ours: Sequence[EngineColumn],
    peers: Sequence[VllmColumn],
    rows: Rows,
    arguments: argparse.Namespace,
    targets: Sequence[Target],
) -> None:
    floors = measure_floors(arguments)
    print_conditions(floors, arguments)
    columns: list[Column] = [*ours, *(column for peer in peers for column in (peer, peer.whole))]
    decode = decode_table(columns, ours[0].model, floors, rows, arguments.repetitions)
    prefill = prefill_table(columns, ours[0].model, floors, rows, arguments.repetitions)
    if floors.gflops:
        print(ratio_table(decode, prefill, targets))


def _pin(num_threads: int) -> list[int]:
    """Keep this process, and those that it starts, on as many of its processors as it has threads."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < num_threads:
        raise SystemExit(f"{num_threads} threads need as many processors, and this process may use {len(allowed)}")
    os.sched_setaffinity(0, allowed[:num_threads])
    return allowed[:num_threads]


def _check_logits(ours: EngineColumn, vllm: VllmColumn) -> None:
    """Let both compute a prompt and a decode step. Ends the process where they do not compute the same."""
    batch = make_batch(1, CHECKED_TOKENS + 1, CHECKED_TOKENS + 1, vllm.vocab_size)
    token_id, theirs = vllm.logits(batch.token_ids[:-1].tolist())
    token_ids = torch.cat([batch.token_ids[:-1], torch.tensor([token_id])])
    checked = torch.tensor([CHECKED_TOKENS - 1, CHECKED_TOKENS])
    logits = ours.model.forward(replace(batch, token_ids=token_ids, logits_indices=checked), ours.kv_cache)
    difference = float((logits - theirs).abs().mean() / theirs.std())
    same = int((logits.argmax(-1) == theirs.argmax(-1)).sum())
    print(f"logits of {ours.name} and {vllm.name}, after {CHECKED_TOKENS} tokens and after one more:", end=" ")
    print(f"mean difference {difference:.1%} of their deviation, {same} of 2 greedy tokens the same")
    if not difference <= _TOLERANCE:
        raise SystemExit(f"they do not compute the same: rounding to bfloat16 makes less than {_TOLERANCE:.0%}")


def ratio_table(
    decode: Mapping[str, Sequence[float]], prefill: Mapping[str, Sequence[float]], targets: Sequence[Target]
) -> str:
    """Our ratios to vLLM's fastest column, of each row's median seconds, and whether they reach the targets."""
    lines = ["| of vLLM | kernels bf16 | target | kernels int8 | target |", "|---|---|---|---|---|"]
    for row, times in decode.items():
        lines.append(_ratios(f"{row}: time", row, [t / _peer_s(times) for t in times], targets, operator.le))
    for row, times in prefill.items():
        lines.append(_ratios(f"{row}: tokens/s", row, [_peer_s(times) / t for t in times], targets, operator.ge))
    return "\n".join(lines)


def _peer_s(times: Sequence[float]) -> float:
    return min(times[_VLLM::2])


def _ratios(
    title: str, row: str, ratios: list[float], targets: Sequence[Target], reaches: Callable[[float, float], bool]
) -> str:
    cells = [title]
    for column in (_KERNELS_BF16, _KERNELS_INT8):
        verdict = ""
        for target in targets:
            if (target.row, target.column) == (row, column):
                sign = "≤" if reaches is operator.le else "≥"
                verdict = f"{sign} {target.ratio:.2f}: {'met' if reaches(ratios[column], target.ratio) else 'missed'}"
        cells += [f"{ratios[column]:.2f}", verdict]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
