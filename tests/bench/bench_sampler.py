"""What sampling a step's tokens costs: the C library beside torch, whose tokens are the same.

    python -m tests.bench.bench_sampler --vocab-size 32000 --num-threads 1

Logits are normal with a deviation of 2: at 32,000 tokens a nucleus of 0.95 holds some 10,000, more than a language
model's would. Milliseconds of processor time of the calling thread, the least of all repetitions; both take turns.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial

import torch

from services.engine.api import SamplingParams
from services.engine.native.sampling import Sampler, SamplingRow
from services.engine.native.sampling.library import usable_path

_PROMPT_TOKENS, _OUTPUT_TOKENS = 2048, 200
ASKED: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "temperature 0.7": {"temperature": 0.7},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "min_p 0.05": {"min_p": 0.05},
    "temperature 0.3, top_p 0.9": {"temperature": 0.3, "top_p": 0.9},
    "temperature 1.5, top_p 0.95": {"temperature": 1.5, "top_p": 0.95},
    "the same, repetition_penalty over 2,248 tokens": {
        "temperature": 1.5,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
    },
    "logit_bias of 300": {"logit_bias": dict.fromkeys(range(300), 1.0)},
    "greedy, logprobs 5": {"temperature": 0.0, "logprobs": 5},
    "equal shares, top_p at a border": {"temperature": 3e38, "top_p": 0.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    path = usable_path()
    if path is None:
        raise SystemExit("the C library is not built: make kernels")
    samplers = [Sampler((2,), arguments.num_threads, each) for each in (None, path)]
    print("| asked | " + " | ".join(f"B = {batch}: torch | C" for batch in arguments.batches) + " |")
    print("|---|" + "---|---|" * len(arguments.batches))
    for name, asked in ASKED.items():
        cells = []
        for batch in arguments.batches:
            logits = torch.randn(batch, arguments.vocab_size, generator=torch.Generator().manual_seed(1)) * 2
            rows = _rows(batch, arguments.vocab_size, asked)
            runs = [partial(each.sample, logits, rows) for each in samplers]
            cells += [f"{1e3 * seconds:.2f}" for seconds in _least(runs, arguments.repetitions)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _rows(batch: int, vocab_size: int, asked: dict[str, object]) -> list[SamplingRow]:
    chooser = random.Random(1)
    prompt = [chooser.randrange(vocab_size) for _ in range(_PROMPT_TOKENS)]
    return [
        SamplingRow(SamplingParams(seed=i, max_tokens=9999, **asked), prompt, prompt[:_OUTPUT_TOKENS])  # type: ignore[arg-type]
        for i in range(batch)
    ]


def _least(runs: list[Callable[[], object]], repetitions: int) -> list[float]:
    """Seconds of each run's fastest; they take turns, after one each to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for repetition in range(repetitions + 1):
        for run, seconds in zip(runs, times, strict=True):
            started = time.thread_time()
            run()
            if repetition > 0:
                seconds.append(time.thread_time() - started)
    return [min(seconds) for seconds in times]


if __name__ == "__main__":
    main()
