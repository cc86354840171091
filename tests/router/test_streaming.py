"""Streamed tokens: shown in the moment of their coming where the client keeps up, else by its task; the same bytes."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager

import httpx
import pytest
from tandem.v1 import worker_pb2 as pb

from services.http_server import DirectBody
from services.router.config import RouterConfig
from services.router.fleet.session import WorkerSession
from services.router.fleet.silence import Silence
from tests.router.fake_worker import Script, endless
from tests.router.harness import running_router, until

CHAT = {"messages": [{"role": "user", "content": "x"}]}
TEXT = 'quo"te \\ line\nünï \U0001f600 \u2028 <&>\t done'


@pytest.fixture
def written(monkeypatch) -> list[bytes]:
    """The parts that were written in the moment of their coming."""
    parts, write = [], DirectBody.write

    def note(self, data):
        parts.append(data)
        write(self, data)

    monkeypatch.setattr(DirectBody, "write", note)
    return parts


@asynccontextmanager
async def asking(worker, url, body):
    async with (
        running_router(RouterConfig(), worker) as running,
        httpx.AsyncClient(base_url=running.base_url, timeout=60) as client,
        client.stream("POST", url, json={**body, "stream": True, "request_id": "asked"}) as response,
    ):
        assert response.status_code == 200
        yield response


async def events_of(worker, url, body) -> list[str]:
    """Each frame of the worker only when the event of the one before has come."""
    events, permits = [], asyncio.Semaphore(1)
    plain = worker.reply
    worker.reply = lambda request: with_permits(plain(request), permits)
    async with asking(worker, url, body) as response:
        rest = b""
        async for part in response.aiter_raw():  # not by lines: httpx takes more for a line's end than events do
            *whole, rest = (rest + part).split(b"\n\n")
            events += [event.decode() for event in whole]
            permits.release()
    assert not rest
    return events


def with_permits(script: Script, permits: asyncio.Semaphore) -> Script:
    script.permits = permits
    return script


def never_free(self) -> bool:
    return False


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "echo": True}),
        ("/v1/completions", {"prompt": "x", "return_token_ids": True}),
        ("/v1/completions", {"prompt": "x", "stop": "line"}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {**CHAT, "stream_options": {"continuous_usage_stats": True, "include_usage": True}}),
        ("/v1/chat/completions", {**CHAT, "receipt": True}),
    ],
)
async def test_events_are_the_same_on_both_ways(make_worker, tokenizer, written, monkeypatch, url, body):
    tokens = tokenizer.encode([TEXT], False)[0]
    body = {**body, "max_tokens": len(tokens)}
    at_once = await events_of(make_worker(endless(tokens)), url, body)
    assert len(written) >= 5
    written.clear()
    monkeypatch.setattr(DirectBody, "is_free", property(never_free))
    by_task = await events_of(make_worker(endless(tokens)), url, body)
    assert not written
    assert [comparable(line) for line in at_once] == [comparable(line) for line in by_task]
    choices = [json.loads(line[6:])["choices"] for line in at_once if line.startswith("data: {")]
    text = "".join(
        choice.get("text") or choice.get("delta", {}).get("content") or "" for (choice, *_) in filter(None, choices)
    )
    assert text == ("x" if "echo" in body else "") + (TEXT.partition("line")[0] if "stop" in body else TEXT)


def comparable(line: str) -> object:
    """Without what depends on the time."""
    if not line.startswith("data: {"):
        return line
    event = json.loads(line[6:])
    return {name: value for name, value in event.items() if name not in ("created", "receipt")}, list(event)


async def test_a_stop_string_ends_a_stream_in_the_moment_of_its_token(make_worker, tokenizer, sentence, written):
    worker = make_worker(endless(sentence))
    stop = tokenizer.decode(sentence[4:5])
    events = await events_of(worker, "/v1/completions", {"prompt": "x", "stop": stop, "max_tokens": 200})
    last = json.loads(events[-2][6:])["choices"][0]
    assert (last["finish_reason"], last["stop_reason"], events[-1]) == ("stop", stop, "data: [DONE]")
    assert [abort.reason for abort in worker.aborts] == ["a stop string was generated"]
    assert written


async def test_who_reads_slowly_gets_all_in_order_and_little_waits_in_the_server(
    make_worker, sentence, tokenizer, written, monkeypatch
):
    num_tokens, waiting, write = 3000, [], DirectBody.write

    def note(self, data):
        write(self, data)
        waiting.append(self._cycle().transport.get_write_buffer_size())

    monkeypatch.setattr(DirectBody, "write", note)
    worker = make_worker(endless(sentence), max_model_len=4000)
    async with running_router(RouterConfig(), worker) as running:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", int(running.base_url.rpartition(":")[2])))
            connection.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
            body = json.dumps({"prompt": "x", "max_tokens": num_tokens, "stream": True}).encode()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            # The worker has said all, nothing was read, and the router had to stop writing.
            await until(lambda: worker.requests and not worker.live and max(waiting, default=0) > 16 << 10)
            content = b""
            while not content.endswith(b"\r\n0\r\n\r\n"):
                content += await reader.read(1 << 16)
            writer.close()
            await writer.wait_closed()
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in content.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(texts) == tokenizer.decode((sentence * (num_tokens // len(sentence) + 1))[:num_tokens])
    assert len(texts) < num_tokens  # what piled up came in one event
    assert written
    assert max(waiting) < 32 << 10


class Sink:
    """Notes what happens between its tokens and others'."""

    def __init__(self, notes: list[object]) -> None:
        self.notes = notes

    def deliver_token(self, token_id: int, is_only: bool) -> None:
        self.notes.append((token_id, is_only))

    def lose(self, reason: str, died: bool) -> None:
        self.notes.append("lost")


async def session_with(make_worker, frame_of) -> tuple[list[object], list[int]]:
    """What the sinks of 100 requests note of a frame, and their handles; `turn` for each turn of the loop."""
    record, sent = make_worker().record(), asyncio.Event()
    notes: list[object] = []
    handles: list[int] = []

    class Orders:
        async def session(self, address, requests):
            yield pb.SessionFrame(incarnation=record.incarnation)
            await sent.wait()
            asyncio.get_running_loop().call_soon(turn)
            yield frame_of(handles)
            notes.append("read")
            await asyncio.Event().wait()

    def turn() -> None:
        notes.append("turn")
        if "read" not in notes:
            asyncio.get_running_loop().call_soon(turn)

    session = WorkerSession(record, "router", Orders(), 0.01, Silence(60.0))
    running = asyncio.create_task(session.run())
    await until(lambda: session.connected)
    handles += [session.submit(pb.SessionRequest(generate=pb.GenerateRequest()), Sink(notes), None) for _ in range(100)]
    sent.set()
    await until(lambda: "read" in notes)
    session.close()
    await running
    return notes[: notes.index("read")], handles


async def test_others_are_served_while_a_large_frame_is_delivered(make_worker):
    notes, handles = await session_with(
        make_worker, lambda all: pb.SessionFrame(handles=all, token_ids=range(len(all)))
    )
    tokens = [note for note in notes if note != "turn"]
    assert tokens == [(number, True) for number in range(len(handles))]
    assert "turn" in notes[notes.index(tokens[0]) : notes.index(tokens[-1])]


async def test_a_sink_is_told_whether_a_frame_has_more_for_it(make_worker):
    notes, _ = await session_with(
        make_worker, lambda all: pb.SessionFrame(handles=[all[0], all[1], all[0]], token_ids=[7, 8, 9])
    )
    assert [note for note in notes if note != "turn"] == [(7, False), (8, True), (9, False)]
