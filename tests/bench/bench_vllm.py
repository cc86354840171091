"""vLLM behind Tandem, disaggregated, beside vLLM alone: what a handoff costs, and what it spares the streams that run.

    make bench-vllm
    make bench-vllm BENCH_ARGS="--dtype float32 --repetitions 30 --rate 0.5"

One model with random weights; `vllm serve`, as its users run it, and `tandem up --engine vllm` with one worker of each
role, of the same vLLM. Prints two tables:

- what a first token takes: prompts one at a time, the two servers in turns, one thread an engine. The difference is
  the handoff's; receipts say of which stages it is made.
- what long prompts do to running streams: `vllm bench serve` sends both the same requests at the same rate, to one
  server after the other. vLLM alone has as many threads there as both of Tandem's engines together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import httpx

from loadtest.send import start_stack, stop_stack
from services.startup import claim_port
from tests.bench.bench_model import write_bench_model

_START_TIMEOUT_S: Final = 600.0
_STOP_TIMEOUT_S: Final = 60.0
NAME: Final = "bench"
_STAGES: Final = ("order", "prefill_order", "prefill_queue", "prefill", "handoff", "join", "step_alignment")
ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@contextlib.contextmanager
def vllm_alone(model: Path, flags: Sequence[str], num_threads: int) -> Iterator[str]:
    """`vllm serve`; its URL."""
    program, port = str(Path(sys.executable).parent / "vllm"), claim_port("127.0.0.1", 0)
    command = [program, "serve", str(model), "--port", str(port), "--host", "127.0.0.1", "--served-model-name", NAME]
    command += ["--enforce-eager", "--disable-log-stats", *flags]
    with tempfile.TemporaryFile() as log:
        environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(num_threads)}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_healthy(url, process)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    give_up_at = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < give_up_at and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"vllm serve did not come up (status {process.returncode})")


@contextlib.contextmanager
def behind_tandem(model: Path, flags: Sequence[str], num_threads: int) -> Iterator[str]:
    """`tandem up` with a prefill and a decode worker; the router's URL."""
    ours = [str(model), "--engine", "vllm", "--prefill", "1", "--decode", "1", "--num-threads", str(num_threads)]
    stack = start_stack("vllm behind tandem", [*ours, "--served-model-name", NAME, *flags])
    try:
        yield stack.url
    finally:
        stop_stack(stack)


async def first_token_s(url: str, prompt: Sequence[int]) -> tuple[float, Mapping[str, Any]]:
    """Seconds from sending to the first token, and the receipt's stages, where there is a receipt."""
    body = {"model": NAME, "prompt": list(prompt), "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    headers, stages, first_s = {"x-tandem-receipt": "1"}, dict[str, Any](), None
    async with httpx.AsyncClient(timeout=300) as client:
        started_s = time.perf_counter()
        async with client.stream(
            "POST", f"{url}/v1/completions", json=body | {"stream": True}, headers=headers
        ) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if first_s is None and chunk["choices"]:
                    first_s = time.perf_counter() - started_s
                if "receipt" in chunk:
                    stages = chunk["receipt"]["sequences"][0]["stage_seconds"]
    assert first_s is not None
    return first_s, stages


def compare_first_tokens(alone: str, tandem: str, lengths: Sequence[int], repetitions: int) -> None:
    """Print the first table."""
    print("| prompt tokens | vLLM alone, ms | behind Tandem, ms | difference | " + " | ".join(_STAGES) + " |")
    print("|---" * (4 + len(_STAGES)) + "|")
    source = random.Random(0)
    for length in lengths:
        times: tuple[list[float], list[float]] = [], []
        stages: list[Mapping[str, Any]] = []
        for number in range(repetitions + 2):
            for url, taken in zip((alone, tandem), times, strict=True):
                prompt = [source.randrange(100, 30_000) for _ in range(length)]
                first_s, told = asyncio.run(first_token_s(url, prompt))
                if number >= 2:  # the first ones find nothing warm
                    taken.append(first_s)
                    stages += [told] * bool(told)
        ours, theirs = (median(taken) * 1e3 for taken in reversed(times))
        by_stage = [median(each[stage] for each in stages) * 1e3 for stage in _STAGES]
        row = " | ".join(f"{milliseconds:.1f}" for milliseconds in by_stage)
        print(f"| {length} | {theirs:.0f} | {ours:.0f} | {ours - theirs:+.0f} | {row} |", flush=True)


def bench_serve(url: str, tokenizer: Path, options: argparse.Namespace) -> Mapping[str, float]:
    """What `vllm bench serve` reports of a server."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            str(Path(sys.executable).parent / "vllm"),
            "bench",
            "serve",
            "--backend",
            "openai",
            "--base-url",
            url,
        ]
        command += ["--model", NAME, "--tokenizer", str(tokenizer), "--ignore-eos", "--seed", "0", "--disable-tqdm"]
        command += ["--dataset-name", "random", "--random-input-len", str(options.input_len)]
        command += ["--random-output-len", str(options.output_len), "--num-prompts", str(options.num_prompts)]
        command += ["--request-rate", str(options.rate), "--percentile-metrics", "ttft,itl"]
        command += ["--metric-percentiles", "50,90,99", "--save-result", "--result-dir", directory]
        command += ["--result-filename", "result.json", "--temperature", "0"]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"vllm bench serve failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        report: Mapping[str, float] = json.loads((Path(directory) / "result.json").read_text())
    if report["failed"] or report["completed"] != options.num_prompts:
        raise SystemExit(
            f"{report['failed']} requests failed, {report['completed']} of {options.num_prompts} completed"
        )
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face directory; without one a random 0.39 B Qwen2 is made"
    )
    parser.add_argument("--dtype", default="bfloat16", help="float32 where the processor has no AVX-512")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--rate", type=float, default=0.5, help="requests a second of vllm bench serve")
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of each engine of Tandem's")
    parser.add_argument("--flags", default="", help="further ones of vLLM's, for both")
    options = parser.parse_args()
    flags = ["--dtype", options.dtype, "--max-model-len", "4096", "--max-num-batched-tokens", "256"]
    flags += ["--block-size", "32", "--kv-cache-memory-bytes", str(1 << 30), *shlex.split(options.flags)]
    with tempfile.TemporaryDirectory() as directory:
        model = options.model or write_bench_model(Path(directory))
        print(f"{model.name}, {options.dtype}, {options.threads} thread(s) an engine\n")
        with vllm_alone(model, flags, options.threads) as alone, behind_tandem(model, flags, options.threads) as tandem:
            compare_first_tokens(alone, tandem, options.lengths, options.repetitions)
        lengths = f"{options.input_len} tokens in, {options.output_len} out"
        print(f"\n{options.num_prompts} requests, {options.rate:g}/s, {lengths}\n")
        print("| | ITL p50 / p90 / p99, ms | TTFT p50 / p99, ms |\n|---|---|---|", flush=True)
        p99_ms: list[float] = []
        for name, serve, num_threads in (
            ("vLLM alone", vllm_alone, 2 * options.threads),
            ("behind Tandem", behind_tandem, options.threads),
        ):
            with serve(model, flags, num_threads) as url:
                bench_serve(url, model, argparse.Namespace(**{**vars(options), "num_prompts": 4}))  # warms it
                report = bench_serve(url, model, options)
            p99_ms.append(report["p99_itl_ms"])
            itl = " / ".join(f"{report[f'{which}_itl_ms']:.0f}" for which in ("p50", "p90", "p99"))
            print(f"| {name} | {itl} | {report['p50_ttft_ms']:.0f} / {report['p99_ttft_ms']:.0f} |", flush=True)
        print(f"\nITL p99: {p99_ms[1] / p99_ms[0]:.2f} of vLLM's alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
