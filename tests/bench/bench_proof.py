"""How fast one core proves blocks, as a table: by C, by numpy, and by torch as a device does it.

    python -m tests.bench.bench_proof [--device cpu|cuda] [--seconds 0.3]

"cached": the same block again and again, as right after it was computed; "memory": blocks of a pool larger than most
caches, in random order. Each figure is the best of several rounds, by the time that the processor spent on us (by the
clock, where a GPU does it); the sum of a block's words reads its bytes once, for a yardstick.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvstore.block import BlockHash, HostMemory, Multipliers, ProofKey, checksums, is_compiled, subject_of
from kvstore.block.row_sums import sums_by_numpy
from services.engine.tensor_memory import DeviceMemory

POOL_BYTES = 256 << 20
ROUNDS = 7
SUBJECT = subject_of(BlockHash(bytes(16)))


def gigabytes_per_s(
    work: Callable[[Sequence[int]], object],
    ids: Sequence[int],
    block_bytes: int,
    seconds: float,
    clock: Callable[[], float],
) -> float:
    """The best of some rounds over these blocks."""
    work(ids[:1])
    best, end = 0.0, time.perf_counter() + seconds
    for number in range(1000):
        if number >= ROUNDS and time.perf_counter() > end:
            break
        start = clock()
        work(ids)
        best = max(best, len(ids) * block_bytes / (clock() - start) / 1e9)
    return best


def main() -> None:
    """Print a row for each way and size of block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="of torch")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure, at least")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    key, multipliers = ProofKey(bytes(range(32))), Multipliers.of(bytes(32))
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    clock = time.perf_counter if arguments.device == "cuda" else time.thread_time
    sizes = ("64 KiB", "384 KiB", "4 MiB")
    title = f"GB/s, one core, C {'built' if is_compiled() else 'not built'}, torch on {name}"
    print(f"| {title} | {' | '.join(f'{size} {where}' for size in sizes for where in ('cached', 'memory'))} |")
    print("|---|---|---|---|---|---|---|")
    pool = np.random.default_rng(0).integers(0, 2**63, POOL_BYTES // 8, dtype=np.int64).view(np.uint8)
    rows: dict[str, list[float]] = {}
    for block_bytes in (64 << 10, 384 << 10, 4 << 20):
        num_blocks = POOL_BYTES // block_bytes
        memory = HostMemory(pool[: num_blocks * block_bytes].reshape(num_blocks, block_bytes))
        device = DeviceMemory(torch.from_numpy(memory.array).to(arguments.device)[None])
        words = memory.array.view("<u8")
        ways: dict[str, Callable[[Sequence[int]], object]] = {
            "sum of the bytes' words, numpy": lambda ids: [int(words[i].sum()) for i in ids],  # noqa: B023
            "prove": lambda ids: key.prove(memory, ids, [SUBJECT] * len(ids)),  # noqa: B023
            "checksum": lambda ids: checksums(memory, ids),  # noqa: B023
            "row sums alone": lambda ids: memory.sums(ids, multipliers),  # noqa: B023
            "row sums, numpy": lambda ids: [sums_by_numpy(multipliers, words[i]) for i in ids],  # noqa: B023
            "prove, torch": lambda ids: key.prove(device, ids, [SUBJECT] * len(ids)),  # noqa: B023
        }
        scattered = random.Random(0).sample(range(num_blocks), min(num_blocks, 96))
        for way, work in ways.items():
            for ids in ([0] * 16, scattered):
                rows.setdefault(way, []).append(gigabytes_per_s(work, ids, block_bytes, arguments.seconds, clock))
    for way, figures in rows.items():
        print(f"| {way} | {' | '.join(f'{figure:.1f}' for figure in figures)} |")


if __name__ == "__main__":
    main()
