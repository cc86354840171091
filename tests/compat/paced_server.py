"""An OpenAI-compatible server that answers on a fixed timetable, to compare the tools that measure servers.

The first token of an answer leaves `--ttft-ms` after the request came in, each further one `--itl-ms` after the one
before; a token that leaves late does not delay the next. Prints its URL. It runs on the HTTP server that the router
runs on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MODEL = "tandem-demo"


class PacedServer:
    """The ASGI application."""

    def __init__(self, ttft_s: float, itl_s: float) -> None:
        self._ttft_s = ttft_s
        self._itl_s = itl_s

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        if scope["method"] == "POST" and scope["path"] == "/v1/completions":
            await self._answer(await _body(receive), arrived, send)
        elif scope["path"] in ("/health", "/v1/models"):
            await _respond(send, 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        else:
            await _respond(send, 404, {"error": {"message": "there is nothing here"}})

    async def _answer(self, body: dict[str, Any], arrived: float, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        prompt, num_tokens = body["prompt"], body["max_tokens"]
        head = {"id": f"cmpl-{arrived}", "object": "text_completion", "created": int(time.time()), "model": MODEL}
        counts = {"prompt_tokens": len(prompt.split() if isinstance(prompt, str) else prompt)}
        options = body.get("stream_options") or {}

        async def write(event: dict[str, Any] | None) -> None:
            data = b"[DONE]" if event is None else json.dumps(head | event).encode()
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

        for index in range(num_tokens):
            due = arrived + self._ttft_s + index * self._itl_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if index == 0:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            reason = "length" if index == num_tokens - 1 else None
            event: dict[str, Any] = {"choices": [{"index": 0, "text": " token", "finish_reason": reason}]}
            if options.get("continuous_usage_stats"):
                event["usage"] = _usage(counts, index + 1)
            await write(event)
        if options.get("include_usage"):
            await write({"choices": [], "usage": _usage(counts, num_tokens)})
        await write(None)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _usage(counts: dict[str, int], num_tokens: int) -> dict[str, int]:
    return counts | {"completion_tokens": num_tokens, "total_tokens": counts["prompt_tokens"] + num_tokens}


async def _body(receive: Receive) -> dict[str, Any]:
    data, more = b"", True
    while more:
        message = await receive()
        data += message.get("body", b"")
        more = message.get("more_body", False)
    body: dict[str, Any] = json.loads(data)
    return body


async def _respond(send: Send, status: int, content: dict[str, Any]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(content).encode(), "more_body": False})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ttft-ms", type=float, default=200.0)
    parser.add_argument("--itl-ms", type=float, default=20.0)
    flags = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    app = PacedServer(flags.ttft_ms / 1000, flags.itl_ms / 1000)
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", loop="uvloop")  # type: ignore[arg-type]
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
