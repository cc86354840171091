"""What a request and a token cost the router, in microseconds of its processor time, as a table.

    python -m tests.bench.bench_router [--num-requests 160] [--concurrency 16] [--step-ms 5] [--repeats 3]

One router in a process of its own, a worker without a model in another that gives every request a token a step in one
frame, as decode workers do, and this process as the client. The least of the repeats, in processor time: so a busy
machine shows little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from tandem.v1 import worker_pb2 as pb

from kvstore.registry import WorkerRecord
from kvstore.threads import OsThreads
from services.orders import GrpcOrders
from services.router.app import make_app
from services.router.config import RouterConfig
from services.router.process import Seams, bind, open_parts
from services.router.text import ModelTokenizer
from tests.router.fake_worker import FakeWorker, endless
from tests.router.harness import FakeMembership, until
from tests.router.tiny_model import byte_level_tokenizer, write_tiny_model

NUM_TOKENS = 100
CHAT = {"messages": [{"role": "user", "content": "Hello world! How are you today?"}]}
TEXT = {"prompt": "Hello world! How are you today?"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion, whole, 1 token": ("/v1/completions", {**TEXT, "max_tokens": 1}),
    "completion, whole, 100 tokens": ("/v1/completions", {**TEXT, "max_tokens": NUM_TOKENS}),
    "completion, stream, 100 tokens": ("/v1/completions", {**TEXT, "max_tokens": NUM_TOKENS, "stream": True}),
    "chat, stream, 100 tokens": ("/v1/chat/completions", {**CHAT, "max_tokens": NUM_TOKENS, "stream": True}),
    "chat, stream, 100 tokens, logprobs": (
        "/v1/chat/completions",
        {**CHAT, "max_tokens": NUM_TOKENS, "stream": True, "logprobs": True, "top_logprobs": 2},
    ),
    "completion, whole, prompt of 4,000 ids": ("/v1/completions", {"prompt": [7, 300] * 2000, "max_tokens": 1}),
}


class SteppingWorker(FakeWorker):
    """One token for every live request a step, in one frame."""

    def __init__(self, model_path: str, token_ids: list[int], step_s: float) -> None:
        super().__init__(endless(token_ids), model_path=model_path, max_model_len=8192)
        self._token_ids = token_ids
        self._step_s = step_s

    async def Session(self, request_iterator, context):
        orders: dict[int, list[Any]] = {}
        reader = asyncio.create_task(self._take(request_iterator, orders))
        yield pb.SessionFrame(load=self.load, incarnation=self.incarnation)
        try:
            while not reader.done():
                await asyncio.sleep(self._step_s)
                if orders:
                    frame = pb.SessionFrame()
                    for handle in list(orders):
                        self._step(orders, handle, frame)
                    yield frame
        finally:
            reader.cancel()

    async def _take(self, requests, orders: dict[int, list[Any]]) -> None:
        async for message in requests:
            if message.HasField("generate"):
                orders[message.generate.handle] = [message.generate, 0]
            elif message.HasField("abort"):
                orders.pop(message.abort.handle, None)

    def _step(self, orders: dict[int, list[Any]], handle: int, frame: pb.SessionFrame) -> None:
        request, number = orders[handle]
        orders[handle][1] = number + 1
        token_id = self._token_ids[number % len(self._token_ids)]
        if 0 < number < request.sampling.max_tokens - 1 and not request.sampling.HasField("logprobs"):
            frame.handles.append(handle)
            frame.token_ids.append(token_id)
            return
        output = frame.outputs.add(handle=handle, token_ids=[token_id])
        if request.sampling.HasField("logprobs"):
            top = [pb.TokenLogprob(token_id=7 + i, logprob=-float(i + 1), rank=i + 1) for i in range(2)]
            output.logprobs.add(chosen=top[0], top=top)
        if number + 1 == request.sampling.max_tokens:
            del orders[handle]
            output.finish_reason = pb.FINISH_REASON_LENGTH
            output.usage.num_prompt_tokens = len(request.prompt_token_ids)
            output.usage.num_generated_tokens = number + 1


async def serve_worker(pipe: Connection, model_path: str, token_ids: list[int], step_s: float) -> None:
    worker = SteppingWorker(model_path, token_ids, step_s)
    await worker.start()
    pipe.send(worker.record())
    await asyncio.to_thread(pipe.recv)
    await worker.stop()


async def serve_router(pipe: Connection, record: WorkerRecord) -> None:
    """Answers each message with the processor seconds used so far."""
    listener = bind("127.0.0.1", 0)
    seams = Seams(GrpcOrders(), OsThreads(), time.monotonic, time.time)
    async with open_parts(RouterConfig(), FakeMembership((record,)), "bench", seams) as parts:
        server = uvicorn.Server(uvicorn.Config(make_app(parts), log_config=None, access_log=False, lifespan="off"))
        serving = asyncio.create_task(server.serve([listener]))
        await until(lambda: server.started and parts.workers.num_sessions_up == 1 and "tiny" in parts.models.names())
        pipe.send(listener.getsockname()[1])
        while await asyncio.to_thread(pipe.recv):
            pipe.send(time.process_time())
        server.should_exit = True
        await serving


def in_process(serve: Callable[..., Coroutine[Any, Any, None]], pipe: Connection, *args: object) -> None:
    uvloop.run(serve(pipe, *args))


def start(serve: Callable[..., Coroutine[Any, Any, None]], *args: object) -> tuple[Any, Connection, Any]:
    """The process, its pipe, and the first thing that it says."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=in_process, args=(serve, theirs, *args), daemon=True)
    process.start()
    theirs.close()  # so that a process that dies is heard
    return process, ours, ours.recv()


async def ask(port: int, path: str, body: dict[str, Any], num_requests: int) -> None:
    """One connection that asks one request after the other; reads as little as a client can."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    for _ in range(num_requests):
        writer.write(head + content)
        status = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in status, status
        if b"chunked" in status:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        else:
            length = next(line for line in status.split(b"\r\n") if line.lower().startswith(b"content-length"))
            await reader.readexactly(int(length.partition(b":")[2]))
    writer.close()


async def measure(pipe: Connection, port: int, case: str, num_requests: int, concurrency: int) -> float:
    """Microseconds of the router per request."""
    path, body = CASES[case]

    async def load(each: int) -> None:
        await asyncio.gather(*(ask(port, path, body, each) for _ in range(concurrency)))

    def seconds() -> float:
        pipe.send(True)
        return float(pipe.recv())

    await load(1)
    before = seconds()
    await load(num_requests // concurrency)
    return (seconds() - before) / (num_requests // concurrency * concurrency) * 1e6


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--num-requests", type=int, default=160)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder), byte_level_tokenizer())
        token_ids = ModelTokenizer(model).encode(["Hello world! How are you today? "], False)[0]
        worker, worker_pipe, record = start(serve_worker, str(model), token_ids, options.step_ms / 1e3)
        router, pipe, port = start(serve_router, record)
        print(f"{'case':40} {'us/request':>11} {'us/token':>9}")
        for case, (_, body) in CASES.items():
            us = min(
                asyncio.run(measure(pipe, port, case, options.num_requests, options.concurrency))
                for _ in range(options.repeats)
            )
            per_token = f"{us / NUM_TOKENS:9.1f}" if body["max_tokens"] > 1 else ""
            print(f"{case:40} {us:11.0f} {per_token}", flush=True)
        pipe.send(None)
        worker_pipe.send(None)
        router.join(10)
        worker.join(10)


if __name__ == "__main__":
    main()
