"""A decode worker without a model: follows the Session protocol of worker.proto, and says what its script says."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
from tandem.v1 import worker_pb2 as pb
from tandem.v1.worker_pb2_grpc import DecodeServiceServicer, add_DecodeServiceServicer_to_server

from kvstore.registry import WorkerRecord
from services.orders import RESUMES
from tests.worker_records import worker_record

_counter = itertools.count(1)


@dataclass
class Script:
    """What a worker does with one request: frames of tokens, one after the other, and how it ends."""

    frames: Sequence[Sequence[int]] = ()
    finish: int = pb.FINISH_REASON_LENGTH  # FINISH_REASON_UNSPECIFIED: it never ends
    error: pb.Error | None = None
    stop_token_id: int | None = None
    pause_s: float = 0.0  # before each frame
    permits: asyncio.Semaphore | None = None  # each frame takes one, and waits for it
    num_cached_tokens: int = 0
    usage: pb.Usage | None = None  # with the first frame and, completed, with the last; None: with the last only
    stamps: Sequence[tuple[int, float]] = ()  # event, unix seconds


Reply = Callable[[pb.GenerateRequest], Script]


def endless(token_ids: Sequence[int], eos_token_id: int | None = None, tokens_per_frame: int = 1) -> Reply:
    """Repeats the tokens up to max_tokens, or says them once and then end-of-sequence (unless ignore_eos); goes on
    behind those that it resumes."""

    def reply(request: pb.GenerateRequest) -> Script:
        limit = request.sampling.max_tokens
        if eos_token_id is not None and not request.sampling.ignore_eos:
            tokens = [*token_ids, eos_token_id]
            finish = pb.FINISH_REASON_STOP if len(tokens) <= limit else pb.FINISH_REASON_LENGTH
        else:
            tokens, finish = list(itertools.islice(itertools.cycle(token_ids), limit)), pb.FINISH_REASON_LENGTH
        tokens = tokens[len(request.resumed_token_ids) : limit]
        frames = [tokens[i : i + tokens_per_frame] for i in range(0, len(tokens), tokens_per_frame)]
        return Script(frames, finish)

    return reply


def permit(permits: asyncio.Semaphore, number: int) -> None:
    """Let so many frames go."""
    for _ in range(number):
        permits.release()


def failing(code: int, message: str = "as the test wants it", after: Sequence[Sequence[int]] = ()) -> Reply:
    """Fails with this error, after some frames."""
    return lambda request: Script(after, pb.FINISH_REASON_ERROR, pb.Error(code=code, message=message))


def position(token_id: int, num_top: int) -> pb.PositionLogprobs:
    """Made-up log probabilities: the chosen token is the likeliest at -0.5, its neighbours follow at -1, -2 …"""
    top = [pb.TokenLogprob(token_id=token_id, logprob=-0.5, rank=1)]
    top += [pb.TokenLogprob(token_id=token_id + i, logprob=-float(i), rank=i + 1) for i in range(1, num_top)]
    return pb.PositionLogprobs(chosen=top[0], top=top[:num_top])


def prompt_positions(request: pb.GenerateRequest) -> list[pb.PositionLogprobs]:
    if not request.sampling.HasField("prompt_logprobs"):
        return []
    first, *rest = request.prompt_token_ids
    del first
    return [pb.PositionLogprobs(), *(position(token_id, request.sampling.prompt_logprobs) for token_id in rest)]


@dataclass
class FakeWorker(DecodeServiceServicer):
    """One decode worker. `reply` may be replaced at any time."""

    reply: Reply
    model_names: tuple[str, ...] = ("tiny",)
    adapters: tuple[str, ...] = ()
    model_path: str = ""
    max_model_len: int = 256
    max_num_seqs: int = 64
    worker_id: str = ""
    colocated: bool = False
    features: tuple[str, ...] = (RESUMES,)
    load: pb.Load = field(default_factory=pb.Load)
    heartbeat_s: float = 0.0  # promised, and kept until it is mute
    stuck: str = ""  # what its sessions begin with
    is_mute: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    lists: dict[int, pb.SamplingParams] = field(default_factory=dict)  # that it holds, by number
    num_lists_told: int = 0
    redirects: list[pb.RedirectRequest] = field(default_factory=list)
    aborts: list[pb.AbortRequest] = field(default_factory=list)
    hellos: list[pb.SessionHello] = field(default_factory=list)
    live: dict[tuple[asyncio.Queue, int], asyncio.Task[None]] = field(default_factory=dict)  # by session and handle

    def __post_init__(self) -> None:
        number = next(_counter)
        self.worker_id = self.worker_id or f"fake-{number}"
        self.incarnation = f"{number:024x}"
        self.port = 0
        self._server: grpc.aio.Server | None = None
        self._abort_seen = asyncio.Event()
        self._sessions: list[asyncio.Queue[pb.SessionFrame | None]] = []

    async def start(self) -> None:
        # Routers ping a session that is idle.
        options = [("grpc.http2.min_recv_ping_interval_without_data_ms", 1000), ("grpc.http2.max_ping_strikes", 0)]
        self._server = grpc.aio.server(options=options)
        add_DecodeServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """As if the process were killed."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def record(self, role: str = "decode") -> WorkerRecord:
        return worker_record(
            worker_id=self.worker_id,
            role=role,
            incarnation=self.incarnation,
            served_model_names=self.model_names,
            adapters=self.adapters,
            model_path=self.model_path,
            tokenizer_path=self.model_path,
            grpc_address=f"127.0.0.1:{self.port}",
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            colocated=self.colocated,
            transports=("memory",),
            numerics="paper/float32",
        )

    async def wait_for_abort(self, num_aborts: int) -> None:
        async with asyncio.timeout(60):
            while len(self.aborts) < num_aborts:
                self._abort_seen.clear()
                await self._abort_seen.wait()

    async def Session(self, request_iterator, context):
        frames: asyncio.Queue[pb.SessionFrame | None] = asyncio.Queue()
        self._sessions.append(frames)
        tasks = [asyncio.create_task(self._read(request_iterator, frames)), asyncio.create_task(self._beat(frames))]
        try:
            while (frame := await frames.get()) is not None:
                yield frame
        finally:
            for task in tasks:
                task.cancel()
            for key in [key for key in self.live if key[0] is frames]:
                self.live.pop(key).cancel()

    def say(self, frame: pb.SessionFrame) -> None:
        """In the newest session, and, if it is what stands still, at the beginning of each one that follows."""
        self.stuck = frame.stuck
        self._sessions[-1].put_nowait(frame)

    async def _beat(self, frames: asyncio.Queue[pb.SessionFrame | None]) -> None:
        while self.heartbeat_s and not self.is_mute.is_set():
            await asyncio.sleep(self.heartbeat_s)
            frames.put_nowait(pb.SessionFrame())

    async def _read(self, requests, frames: asyncio.Queue[pb.SessionFrame | None]) -> None:
        async for message in requests:
            if message.HasField("hello"):
                self.hellos.append(message.hello)
                frame = pb.SessionFrame(load=self.load, incarnation=self.incarnation, features=self.features)
                frame.heartbeat_s, frame.stuck = self.heartbeat_s, self.stuck
                frames.put_nowait(frame)
            elif message.HasField("lists"):
                self.num_lists_told += 1
                self.lists[message.lists.number] = message.lists.sampling
            elif message.HasField("forget"):
                del self.lists[message.forget.number]
            elif message.HasField("generate"):
                if message.generate.token_lists:
                    message.generate.sampling.MergeFrom(self.lists[message.generate.token_lists])
                self.requests.append(message.generate)
                self.live[frames, message.generate.handle] = asyncio.create_task(self._run(message.generate, frames))
            elif message.HasField("redirect"):
                self.redirects.append(message.redirect)
            elif message.HasField("abort"):
                self.aborts.append(message.abort)
                self._abort_seen.set()
                task = self.live.pop((frames, message.abort.handle), None)
                if task is not None:
                    task.cancel()
        frames.put_nowait(None)

    async def _run(self, request: pb.GenerateRequest, frames: asyncio.Queue[pb.SessionFrame | None]) -> None:
        script = self.reply(request)
        num_generated = 0
        num_frames = len(script.frames)
        for index, token_ids in enumerate(script.frames):
            await asyncio.sleep(script.pause_s)
            if script.permits is not None:
                await script.permits.acquire()
            num_generated += len(token_ids)
            output = pb.Output(handle=request.handle, token_ids=token_ids)
            if request.sampling.HasField("logprobs"):
                output.logprobs.extend(position(token_id, request.sampling.logprobs) for token_id in token_ids)
            if 0 < index < num_frames - 1 and not output.logprobs:
                rows = [request.handle] * len(token_ids)
                frames.put_nowait(pb.SessionFrame(handles=rows, token_ids=token_ids, load=self.load))
                continue
            if index == 0 and script.usage is not None:
                output.usage.CopyFrom(script.usage)
            if index == 0:
                output.prompt_logprobs.extend(prompt_positions(request))
            if index == num_frames - 1 and script.error is None:
                self._end(output, request, script, num_generated)
            frames.put_nowait(pb.SessionFrame(outputs=[output], load=self.load))
        if script.error is not None or not num_frames:
            output = pb.Output(handle=request.handle)
            self._end(output, request, script, num_generated)
            if output.finish_reason:
                frames.put_nowait(pb.SessionFrame(outputs=[output], load=self.load))
        if script.finish:
            self.live.pop((frames, request.handle), None)

    def _end(self, output: pb.Output, request: pb.GenerateRequest, script: Script, num_generated: int) -> None:
        output.finish_reason = script.finish
        if script.error is not None:
            output.error.CopyFrom(script.error)
        if not script.finish:
            return
        if script.stop_token_id is not None:
            output.stop_token_id = script.stop_token_id
        output.usage.num_cached_tokens = script.num_cached_tokens
        if script.usage is not None:
            output.usage.CopyFrom(script.usage)
        output.usage.num_prompt_tokens = len(request.prompt_token_ids) + len(request.resumed_token_ids)
        output.usage.num_generated_tokens = num_generated
        output.stamps.extend(pb.Stamp(event=event, unix_s=unix_s) for event, unix_s in script.stamps)
