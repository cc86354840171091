"""Measures what many choices with lists of tokens cost on their way to a decode worker.

    python -m tests.bench.bench_token_lists [--choices 128] [--tokens 2000] [--runs 5]

The product's router, asked without HTTP, and the product's decode service, with nothing behind it; between the two the
session's messages, as bytes. Once with a worker that knows the feature `lists`, once with one that does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from tandem.v1 import worker_pb2 as pb

from kvstore.threads import OsThreads
from services.decode.config import DecodeConfig
from services.decode.service import DecodeService
from services.orders import LISTS, MOVES, RESUMES
from services.rates import RateLearner
from services.router.config import RouterConfig
from services.router.process import Seams, open_parts
from tests.router.direct import DirectClient
from tests.router.harness import FakeMembership
from tests.router.tiny_model import byte_level_tokenizer, write_tiny_model
from tests.waiting import until
from tests.worker_records import worker_record

VOCAB_SIZE = 32_000


class Wire:
    """A session's way to a worker that ends all choices of a request once all have come."""

    def __init__(self, features: Sequence[str], num_choices: int) -> None:
        self.sent: list[bytes] = []
        self._features = features
        self._num_choices = num_choices

    async def session(
        self, address: str, requests: AsyncIterator[pb.SessionRequest]
    ) -> AsyncGenerator[pb.SessionFrame, None]:
        await anext(requests)
        yield pb.SessionFrame(incarnation="1", load=pb.Load(), features=self._features)
        frame = pb.SessionFrame()
        async for request in requests:
            self.sent.append(request.SerializeToString())
            if request.HasField("generate"):
                frame.outputs.add(handle=request.generate.handle, token_ids=[5], finish_reason=pb.FINISH_REASON_LENGTH)
            if len(frame.outputs) == self._num_choices:
                yield frame
                frame = pb.SessionFrame()


class Nobody:
    """Takes every call, and nothing comes of it."""

    is_behind = False

    def __getattr__(self, name: str) -> object:
        return lambda *_: None


async def router(model: Path, body: dict[str, object], wire: Wire) -> float:
    """Processor seconds of a request."""
    record = worker_record(
        worker_id="decode",
        role="decode",
        incarnation="1",
        served_model_names=("tiny",),
        model_path=str(model),
        tokenizer_path=str(model),
        max_num_seqs=256,
        max_model_len=256,
    )
    seams = Seams(wire, OsThreads(), time.monotonic, time.time)  # type: ignore[arg-type]
    async with open_parts(RouterConfig(), FakeMembership((record,)), "bench", seams) as parts:  # type: ignore[arg-type]
        await until(lambda: parts.workers.num_sessions_up == 1 and "tiny" in parts.models.names())
        started_s = time.process_time()
        answer = await DirectClient(parts).ask(**body)
        took_s = time.process_time() - started_s
        assert answer.error is None, answer.error
        await asyncio.sleep(0.1)  # what is sent after the last answer
    return took_s


async def decode(sent: Sequence[bytes], num_choices: int) -> float:
    """Processor seconds until a decode worker has taken all orders on, and goes on with none of them."""

    async def waits_for_ever(*_: object) -> None:
        await asyncio.Event().wait()

    capabilities = SimpleNamespace(max_num_seqs=num_choices)
    parts = SimpleNamespace(
        worker_id="decode",
        incarnation="1",
        engine=SimpleNamespace(
            capabilities=capabilities, layout=SimpleNamespace(model_fingerprint="model", block_size=16)
        ),
        thread=Nobody(),
        metrics=Nobody(),
        rates=RateLearner(),
        clock=time.time,
        threads=OsThreads(),
        host_prefixes=SimpleNamespace(restore=waits_for_ever),
    )
    service = DecodeService(DecodeConfig(model="model"), parts)  # type: ignore[arg-type]
    service._load = pb.Load  # type: ignore[method-assign]
    orders = [data for data in sent if not pb.SessionRequest.FromString(data).HasField("forget")]

    async def requests() -> AsyncIterator[pb.SessionRequest]:
        yield pb.SessionRequest(hello=pb.SessionHello(router_id="bench", protocol_version="2"))
        for data in orders:
            yield pb.SessionRequest.FromString(data)
        await asyncio.Event().wait()

    async def send(frame: pb.SessionFrame) -> None:
        assert not frame.outputs, frame.outputs

    started_s = time.process_time()
    serving = asyncio.create_task(service.serve_session(requests(), send))
    await until(lambda: sum(map(len, service._sessions.values())) == num_choices)
    took_s = time.process_time() - started_s
    serving.cancel()
    await asyncio.wait([serving])
    return took_s


async def bench(model: Path, num_choices: int, num_tokens: int, num_runs: int) -> None:
    asked: dict[str, dict[str, object]] = {
        "allowed_token_ids": {"allowed_token_ids": list(range(1000, 1000 + num_tokens))},
        "logit_bias": {"logit_bias": {str(token_id): 1.0 for token_id in range(1000, 1000 + num_tokens)}},
        "both": {},
    }
    asked["both"] = asked["allowed_token_ids"] | asked["logit_bias"]
    print(f"n={num_choices}, {num_tokens:,} tokens    wire, KB    router, ms    decode worker, ms")
    for what, lists in asked.items():
        body = {"prompt": [5, 6, 7], "max_tokens": 1, "n": num_choices, **lists}
        for form, features in (("in each order", (RESUMES, MOVES)), ("apart", (RESUMES, MOVES, LISTS))):
            routers, decodes = [], []
            for _ in range(num_runs):
                wire = Wire(features, num_choices)
                routers.append(await router(model, body, wire))
                decodes.append(await decode(wire.sent, num_choices))
            kilobytes = sum(map(len, wire.sent)) / 1000
            router_ms, decode_ms = (1000 * statistics.median(each) for each in (routers, decodes))
            print(f"{what}, {form}    {kilobytes:,.0f}    {router_ms:.0f}    {decode_ms:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--choices", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        model = write_tiny_model(Path(directory) / "tiny", byte_level_tokenizer())
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB_SIZE}))
        asyncio.run(bench(model, args.choices, args.tokens, args.runs))


if __name__ == "__main__":
    main()
