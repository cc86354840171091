"""Nine of ten streams are cut at once: tokens a second before and after, of those who stay and of who comes instead.

    python -m tests.bench.bench_abort_storm
    python -m tests.bench.bench_abort_storm --streams 200 --step-s 0.1

Two paced decode workers and a paced prefill worker, a real router, transfers and Redis. Each client that cuts its
stream asks for another one at once. In the end every block is free, or the bench fails. The clients are a process of
their own and tell what they got, second by second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tests.hf_models import random_prompts, write_model
from tests.stack import Stack

_BEFORE_S, _AFTER_S = 5, 10
_MAX_TOKENS = 1000


@dataclass
class Clients:
    """`heard`: when each token came, by the kind of its client; `refused` and `errors`: answers that were none."""

    url: str
    heard: dict[str, list[float]] = field(default_factory=lambda: {"cut": [], "stay": [], "new": []})
    late_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    num_begun: Counter[str] = field(default_factory=Counter)

    async def stream(self, kind: str, prompt: list[int]) -> None:
        """Take tokens until cancelled; then the connection is reset."""
        parts = urlsplit(self.url)
        body = {"model": "m", "prompt": prompt, "max_tokens": _MAX_TOKENS, "ignore_eos": True, "stream": True}
        data = json.dumps({**body, "temperature": 0, "return_token_ids": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            status = (await reader.readline()).split()
            if status[1:2] != [b"200"]:
                self.failures[b" ".join(status[1:]).decode()] += 1
                return
            is_first = True
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    self.failures[str(event["error"])[:200]] += 1
                    return
                self.heard[kind] += [time.monotonic()] * sum(len(each["token_ids"] or []) for each in event["choices"])
                self.num_begun[kind] += is_first
                is_first = False
            self.failures["ended early"] += 1
        finally:
            writer.transport.abort()


async def storm(url: str, options: argparse.Namespace) -> str:
    """All begin, most are cut, as many come anew; the table."""
    clients = Clients(url)
    prompts = iter(random_prompts([options.prompt_tokens] * 2 * options.streams, seed=9))
    num_cut = round(options.streams * options.share)
    kinds = ["cut"] * num_cut + ["stay"] * (options.streams - num_cut)
    tasks = [asyncio.create_task(clients.stream(kind, next(prompts))) for kind in kinds]
    async with asyncio.timeout(300):
        while clients.num_begun.total() < options.streams and not clients.failures:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    await asyncio.sleep(_BEFORE_S + 1)
    at = time.monotonic()
    for task in tasks[:num_cut]:
        task.cancel()
    tasks += [asyncio.create_task(clients.stream("new", next(prompts))) for _ in range(num_cut)]
    await asyncio.sleep(_AFTER_S + 0.1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not clients.failures, clients.failures
    lines = [
        "| second | of streams that are cut | of those who stay | of new ones | tokens/s in all |",
        "|---|---|---|---|---|",
    ]
    for second in range(-_BEFORE_S, _AFTER_S):
        begin = at + second
        counts = [sum(begin <= each < begin + 1 for each in times) for times in clients.heard.values()]
        lines.append(f"| {second:+d} | {' | '.join(map(str, counts))} | {sum(counts)} |")
    before, after = (
        sum(begin <= each - at < end for kind in kinds_ for each in clients.heard[kind]) / (end - begin)
        for begin, end, kinds_ in ((-_BEFORE_S, 0, ("cut", "stay")), (0, 5, ("stay", "new")))
    )
    lines.append(
        f"\n{before:.0f} tokens/s in the {_BEFORE_S} s before, {after:.0f} in the 5 s after of who stayed and came"
    )
    return "\n".join(lines)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--share", type=float, default=0.9, help="of the streams that are cut")
    parser.add_argument("--step-s", type=float, default=0.2, help="a decode step, apart from what its batch costs")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(Path(directory) / "model", "qwen3")
        gpu = {"origin": "a bench", "prompt_token_s": 4e-5, "prompt_pair_s": 1.7e-9, "running_s": 2e-5}
        gpu |= {"context_token_s": 4e-8, "max_num_seqs": options.streams}
        slow = Path(directory) / "decode.json"
        slow.write_text(json.dumps({**gpu, "base_s": options.step_s}))
        worker = "--engine paced --num-gpu-blocks-override 40000"
        stack = Stack(
            Path(directory) / "stack",
            model=model,
            worker=worker,
            prefill=["--paced-profile gpu"],
            decode=[f"--local-prefill-max-tokens 0 --paced-profile {slow}"] * 2,
            router=f"--max-concurrent-requests {2 * options.streams} --client-share 1",
        )
        with stack:
            print(asyncio.run(storm(stack.url, options)))
            stack.check_clean()
            print("every block is free")
    return 0


if __name__ == "__main__":
    sys.exit(main())
