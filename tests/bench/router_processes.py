"""What the router's bench runs: a worker without a model in one process, routers in others, each answering for its
processor time. The bench itself is the client.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing as mp
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any, cast

import uvloop
from tandem.v1 import worker_pb2 as pb

from kvstore.registry import WorkerRecord
from kvstore.threads import OsThreads
from services.http_server import HttpServer
from services.orders import GrpcOrders
from services.rates import GUESSED
from services.router.config import RouterConfig
from services.router.process import Seams, bind, open_parts, server_config, settle_heap
from tests.router.fake_worker import FakeWorker, endless
from tests.router.harness import FakeMembership, until
from tests.worker_records import worker_record

_RATES = pb.Rates(**GUESSED.to_wire())


class SteppingWorker(FakeWorker):
    """The first token of a request at once, and one for every live request a step, in one frame."""

    def __init__(self, model_path: str, token_ids: list[int], step_s: float) -> None:
        # With seats for all that a case asks: else requests wait in the router's queue for one.
        super().__init__(endless(token_ids), model_path=model_path, max_model_len=8192, max_num_seqs=1024)
        self._token_ids = token_ids
        self._step_s = step_s

    async def Session(self, request_iterator, context):
        orders: dict[int, list[Any]] = {}
        frames: asyncio.Queue[pb.SessionFrame] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._take(request_iterator, orders, frames)),
            asyncio.create_task(self._tick(orders, frames)),
        ]
        yield pb.SessionFrame(load=self.load, incarnation=self.incarnation)
        try:
            while True:
                yield await frames.get()
        finally:
            for task in tasks:
                task.cancel()

    async def _take(self, requests, orders: dict[int, list[Any]], frames: asyncio.Queue[pb.SessionFrame]) -> None:
        async for message in requests:
            if message.HasField("generate"):
                orders[message.generate.handle] = [message.generate, 0]
                frame = pb.SessionFrame()
                self._step(orders, message.generate.handle, frame)
                frames.put_nowait(frame)
            elif message.HasField("abort"):
                orders.pop(message.abort.handle, None)

    async def _tick(self, orders: dict[int, list[Any]], frames: asyncio.Queue[pb.SessionFrame]) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            if orders:
                frame = pb.SessionFrame(load=pb.Load(num_running=len(orders)))
                for handle in list(orders):
                    self._step(orders, handle, frame)
                frames.put_nowait(frame)

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
        if number == 0 and request.prefill_targets:
            output.usage.prefill_worker_id = request.prefill_targets[0].worker_id
            output.usage.prefill_rates.CopyFrom(_RATES)
        if number + 1 == request.sampling.max_tokens:
            del orders[handle]
            output.finish_reason = pb.FINISH_REASON_LENGTH
            output.usage.num_prompt_tokens = len(request.prompt_token_ids)
            output.usage.num_generated_tokens = number + 1


def prefill_records(decode: WorkerRecord, number: int) -> tuple[WorkerRecord, ...]:
    """So many prefill workers of the same model, which nobody reaches."""
    names = decode.served_model_names
    return tuple(
        worker_record(worker_id=f"prefill-{i}", served_model_names=names, max_model_len=8192) for i in range(number)
    )


async def _serve_worker(pipe: Connection, model_path: str, token_ids: list[int], step_s: float) -> None:
    worker = SteppingWorker(model_path, token_ids, step_s)
    await worker.start()
    pipe.send(worker.record())
    await _tell_cpu(pipe)
    await worker.stop()


async def _tell_cpu(pipe: Connection) -> None:
    """Answers each message with the processor seconds used so far, until one is empty."""
    while await asyncio.to_thread(pipe.recv):
        pipe.send(time.process_time())


async def _serve_router(pipe: Connection, records: tuple[WorkerRecord, ...], listener: socket.socket) -> None:
    listener.setblocking(False)
    seams = Seams(GrpcOrders(), OsThreads(), time.monotonic, time.time)
    config = RouterConfig(shutdown_timeout_s=2, disable_uvicorn_access_log=True, client_share=1.0, tokenizer_queue=1024)
    async with open_parts(config, FakeMembership(records), "bench", seams) as parts:
        server = HttpServer(server_config(config, parts))
        serving = asyncio.create_task(server.serve([listener]))
        await until(lambda: server.started and parts.workers.num_sessions_up == 1 and "tiny" in parts.models.names())
        settle_heap()
        pipe.send(listener.getsockname()[1])
        await _tell_cpu(pipe)
        server.should_exit = True
        await serving


def _in_process(serve: Callable[..., Coroutine[Any, Any, None]], pipe: Connection, *args: object) -> None:
    uvloop.run(serve(pipe, *args))


@contextmanager
def _running(serve: Callable[..., Coroutine[Any, Any, None]], *args: object) -> Iterator[tuple[Connection, Any]]:
    """A process: its pipe, and the first thing that it says."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_in_process, args=(serve, theirs, *args), daemon=True)
    process.start()
    theirs.close()  # so that a process that dies is heard
    yield ours, ours.recv()
    ours.send(None)
    process.join(10)


@contextmanager
def stepping_worker(model_path: str, token_ids: list[int], step_s: float) -> Iterator[BenchWorker]:
    """A decode worker in a process of its own."""
    with _running(_serve_worker, model_path, token_ids, step_s) as (pipe, record):
        yield BenchWorker(pipe, record)


def _cpu_s(pipe: Connection) -> float:
    """Processor time of all threads of a process, so far."""
    pipe.send(True)
    return float(pipe.recv())


class BenchWorker:
    """A decode worker in a process of its own."""

    def __init__(self, pipe: Connection, record: WorkerRecord) -> None:
        self._pipe = pipe
        self.record = record

    def cpu_s(self) -> float:
        return _cpu_s(self._pipe)


class BenchRouter:
    """A router in processes of its own."""

    def __init__(self, pipes: Sequence[Connection], port: int) -> None:
        self._pipes = pipes
        self.port = port

    def cpu_s(self) -> float:
        return sum(map(_cpu_s, self._pipes))


@contextmanager
def bench_router(records: Sequence[WorkerRecord], num_processes: int = 1) -> Iterator[BenchRouter]:
    """A router that knows these workers, of which one decodes. Several processes accept from one socket, as those of
    `--workers` do."""
    with ExitStack() as stack:
        listener = stack.enter_context(bind("127.0.0.1", 0))
        serving = [stack.enter_context(_running(_serve_router, tuple(records), listener)) for _ in range(num_processes)]
        yield BenchRouter([pipe for pipe, _ in serving], listener.getsockname()[1])


class Client(asyncio.Protocol):
    """A connection that asks one request at a time and looks at as little of an answer as a client can."""

    def __init__(self) -> None:
        self._tail = b""
        self._left: int | None = None
        self._done: asyncio.Future[None] | None = None
        self._closed = asyncio.get_running_loop().create_future()
        self.first_event_s: float | None = None
        """When the first event with a token came, by the monotonic clock."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by name

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():
            return
        if self.first_event_s is None and b"data: " in data:
            self.first_event_s = time.monotonic()
        if self._left is None and not self._tail:
            assert data.startswith(b"HTTP/1.1 200 "), data[:300]
            head, _, body = data.partition(b"\r\n\r\n")
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    self._left, data = int(line[15:]), body
        if self._left is not None:
            self._left -= len(data)
        self._tail = (self._tail + data)[-7:]
        if self._left == 0 or self._tail == b"\r\n0\r\n\r\n":
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set_result(None)
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionError("the router has closed the connection"))

    async def ask(self, path: str, body: dict[str, Any]) -> None:
        """Return when the answer is over."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        self._tail, self._left, self.first_event_s = b"", None, None
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(head + content)
        await self._done

    async def close(self) -> None:
        self.transport.close()
        await self._closed


async def connect(port: int) -> Client:
    _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
    return client
