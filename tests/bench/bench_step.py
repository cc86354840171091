"""What a decode worker's step costs beside the model's own: scheduling, metadata, sampling, booking, outputs, frames.

    python -m tests.bench.bench_step --batches 8 32 --num-threads 1

The product's engine on its thread and its decode service on the event loop, in one process; frames are serialized and
go nowhere. A random Qwen2 of 0.39 B parameters. Both ratios are of processor time of the same steps, so that other work
on the machine is little of them: `engine thread` is what a step takes where the loop has a core of its own, `whole
process` where they share one.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from tandem.v1 import worker_pb2 as pb
from torch import Tensor

from kvstore.exchange import Outside
from kvstore.threads import OsThreads
from services.decode.config import DecodeConfig
from services.decode.service import DecodeService
from services.engine.api import Request, StepOutput
from services.engine.native import Engine
from services.engine.native.attention import ForwardBatch
from services.worker import assembly
from services.worker.assembly import Seams
from tests.bench.bench_model import write_bench_model
from tests.memory_orders import MemoryOrders
from tests.memory_transport import MemoryTransport, Switchboard
from tests.worker.decode_worker import RouterOf

ASKED: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature 0.8, top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "greedy, logprobs 5": {"logprobs": 5},
}
_POLL_S = 0.25  # seldom, or the waiting would be part of what is measured


class Moment(NamedTuple):
    """Seconds of processor time, of the engine's thread and of the process, when a step began."""

    engine_s: float
    process_s: float


async def _until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 -- what is waited for sets no event
        await asyncio.sleep(_POLL_S)


class Watch:
    """Notes when steps begin, and what their forward passes take."""

    def __init__(self, engine: Engine) -> None:
        self.begun: list[Moment] = []
        self.forward_s: list[float] = []
        self._step, self._forward = engine.step, engine.model.computation.forward
        engine.step = self.step  # type: ignore[method-assign, assignment]
        engine.model.computation.forward = self.forward  # type: ignore[method-assign]

    def step(self, on_begun: Callable[[Request], None]) -> StepOutput:
        self.begun.append(Moment(time.thread_time(), time.process_time()))
        self.forward_s.append(0.0)
        return self._step(on_begun)

    def forward(self, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        started = time.thread_time()
        logits = self._forward(batch, kv_cache)
        self.forward_s[-1] = time.thread_time() - started
        return logits


class Router(RouterOf):
    async def send(self, frame: pb.SessionFrame) -> None:
        frame.SerializeToString()
        await super().send(frame)


async def bench(model: Path, batches: list[int], context: int, num_threads: int, num_steps: int) -> None:
    config = DecodeConfig(
        model=str(model), num_threads=num_threads, kv_cache_memory_bytes=1 << 30, max_num_seqs=64, device="cpu"
    )
    engine = Engine.from_config(config)
    watch = Watch(engine)
    transport = MemoryTransport(engine.memory, Switchboard(), None, seed=1)
    with patch.object(assembly, "make_transports", lambda *_: [transport]):
        seams = Seams(MemoryOrders(), Outside(threads=OsThreads()), time.time)
        parts = assembly.assemble(config, "decode", engine, "bench", "1", seams)
    service, router = DecodeService(config, parts), Router()
    await parts.exchange.start("127.0.0.1", 0)
    parts.thread.start(service)
    session = asyncio.create_task(service.serve_session(router.orders(), router.send))
    print(
        "| asked, of each row | B | forward, ms | engine thread, of it | whole process, of it |\n|---|---|---|---|---|"
    )
    chooser, handle = random.Random(1), 0
    for name, asked in ASKED.items():
        for batch in batches:
            handles = range(handle + 1, handle + 1 + batch)
            handle += batch
            for each in handles:
                prompt = [chooser.randrange(3, engine.model.config.vocab_size) for _ in range(context)]
                sampling = pb.SamplingParams(
                    max_tokens=4000,
                    ignore_eos=True,
                    seed=each,
                    repetition_penalty=1.0,
                    **{"top_p": 1.0, **asked},  # type: ignore[arg-type]
                )
                router.generate(
                    pb.GenerateRequest(handle=each, request_id=f"r{each}", prompt_token_ids=prompt, sampling=sampling)
                )
            await _until(lambda those=handles: all(len(router.answers[h].token_ids) > 3 for h in those))  # type: ignore[misc]
            first = len(watch.begun)
            await _until(lambda end=first + num_steps + 2: len(watch.begun) > end)  # type: ignore[misc]
            steps = watch.begun[first : first + num_steps + 1]
            forward_s = watch.forward_s[first : first + num_steps]
            engine_s = [b.engine_s - a.engine_s for a, b in pairwise(steps)]
            process_s = [b.process_s - a.process_s for a, b in pairwise(steps)]
            ratios = [
                statistics.median(all_s / bare_s for all_s, bare_s in zip(each_s, forward_s, strict=True))
                for each_s in (engine_s, process_s)
            ]
            cells = " | ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"| {name} | {batch} | {1e3 * statistics.median(forward_s):.1f} | {cells} |", flush=True)
            for each in handles:
                router.abort(each)
            await _until(lambda: not engine.has_work)
    session.cancel()
    await asyncio.wait([session])
    await parts.thread.stop()
    await parts.exchange.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="default: a random one of 0.39 B parameters")
    parser.add_argument("--batches", type=int, nargs="+", default=[8])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--num-steps", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(arguments.model) if arguments.model else write_bench_model(Path(directory))
        asyncio.run(bench(model, arguments.batches, arguments.context, arguments.num_threads, arguments.num_steps))


if __name__ == "__main__":
    main()
