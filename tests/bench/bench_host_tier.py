"""What a worker's host tier costs and saves: a prompt computed, computed while it evicts another one, and brought back.

    python -m tests.bench.bench_host_tier [--model DIR] [--prompt-tokens 1024] [--rounds 5] [--num-threads 1]

Without a model: random weights in the shape of Qwen2.5-0.5B with a small vocabulary, in bfloat16. The paged cache has
room for one prompt, so each prompt evicts the one before it. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from services.engine.api import SamplingParams
from services.engine.config import EngineConfig
from services.engine.native import Engine
from services.engine.native.scheduling import Request
from tests.hf_models import random_prompts, write_model

_SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


def serve(engine: Engine, prompt: list[int]) -> tuple[Request, float]:
    """Compute the prompt and one token; the seconds that it took."""
    request = Request(f"r{time.monotonic_ns()}", prompt, SamplingParams(temperature=0.0, max_tokens=1))
    started_s = time.perf_counter()
    engine.add_request(request)
    while engine.has_work:
        engine.step()
    return request, time.perf_counter() - started_s


def measure(model: Path, arguments: argparse.Namespace) -> None:
    num_tokens = arguments.prompt_tokens
    block_size = 32
    num_blocks = num_tokens // block_size + 1
    config = EngineConfig(
        str(model),
        block_size=block_size,
        max_model_len=num_tokens + 1,
        num_gpu_blocks_override=num_blocks,
        num_threads=arguments.num_threads,
        kv_offloading_size=1.0,
    )
    engine = Engine.from_config(config)
    tier = engine.host_tier
    assert tier is not None
    computed, evicted, out_s, back_s, again = [], [], [], [], []
    for number in range(arguments.rounds + 1):
        engine.pool.drop(range(num_blocks))
        tier._book.drop(range(tier._book.num_slots))
        one, other = random_prompts([num_tokens] * 2, seed=number)
        first, first_s = serve(engine, one)
        before_s = tier.stats.offload_s
        _, second_s = serve(engine, other)
        offload_s = tier.stats.offload_s - before_s
        started_s = time.perf_counter()
        restore = engine.begin_restore(first.block_hashes[:-1])
        assert restore is not None
        restore.copy_back()
        restore.end()
        restored_s = time.perf_counter() - started_s
        request, again_s = serve(engine, one)
        assert request.num_cached_tokens >= num_tokens - 2 * block_size
        if number:  # the first round warms up
            computed.append(first_s)
            evicted.append(second_s)
            out_s.append(offload_s)
            back_s.append(restored_s)
            again.append(again_s)
    num_bytes = (num_tokens // block_size) * engine.layout.block_bytes
    print(f"{num_tokens} tokens, {num_tokens // block_size} blocks of {engine.layout.block_bytes >> 10} KiB; medians")
    print("| | ms | GB/s |\n|---|---|---|")
    rows = [
        ("compute the prompt", computed, False),
        ("compute it and evict another", evicted, False),
        ("of that, copying out", out_s, True),
        ("bring the prompt back: copy, verify, publish", back_s, True),
        ("compute what is left then", again, False),
    ]
    for name, seconds, has_rate in rows:
        median_s = statistics.median(seconds)
        rate = f"{num_bytes / median_s / 1e9:.1f}" if has_rate else ""
        print(f"| {name} | {1000 * median_s:.1f} | {rate} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.model is not None:
        measure(arguments.model, arguments)
        return
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(
            Path(directory) / "model", "qwen2", dtype="bfloat16", **_SHAPE, max_position_embeddings=32768
        )
        measure(model, arguments)


if __name__ == "__main__":
    main()
