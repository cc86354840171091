"""An OpenAI-compatible server that answers at a fixed pace, for tests of the client. Run as a process; prints its URL.

    python tests/loadtest/stub_server.py --stall-after 20 --stall-s 2

It counts what comes in: GET /seen lists the time of each arrival, and when a stall began and ended. A stall answers
nobody, but lets requests come in, as a server whose engine hangs does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time


class Stub:
    def __init__(self, flags: argparse.Namespace) -> None:
        self._flags = flags
        self._arrivals: list[float] = []
        self._bodies: list[dict[str, object]] = []
        self._stall: tuple[float, float] | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            length = next(
                (int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:")), 0
            )
            body = json.loads(await reader.readexactly(length)) if length else {}
            if method == "POST":
                await self._answer(body, writer)
            else:
                await self._page(path, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away
        finally:
            writer.close()

    async def _page(self, path: str, writer: asyncio.StreamWriter) -> None:
        pages = {
            "/v1/models": lambda: json.dumps({"object": "list", "data": [{"id": "stub", "max_model_len": 4096}]}),
            "/seen": lambda: json.dumps({"arrivals": self._arrivals, "stall": self._stall, "bodies": self._bodies}),
            "/metrics": lambda: (
                'vllm:num_requests_running{model_name="stub"} 3.0\n'
                'vllm:num_requests_waiting{model_name="stub"} 1.0\nvllm:kv_cache_usage_perc{model_name="stub"} 0.25\n'
            ),
        }
        page = pages.get(path)
        status = "200 OK" if page else "404 Not Found"
        await self._write(writer, status, page().encode() if page else b"{}")

    async def _write(self, writer: asyncio.StreamWriter, status: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()

    async def _answer(self, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        flags = self._flags
        number = len(self._arrivals)
        self._arrivals.append(time.monotonic())
        self._bodies.append({"prompt": body.get("prompt"), "max_tokens": body["max_tokens"]})
        if number == flags.stall_after:
            self._stall = time.monotonic(), time.monotonic() + flags.stall_s
        if number in flags.refuse:
            await self._write(writer, "503 Service Unavailable", b'{"error": {"message": "full"}}')
            return
        if number in flags.fail:
            await self._write(writer, "500 Internal Server Error", b'{"error": {"message": "broken"}}')
            return
        await self._while_stalled()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for index in range(int(str(body["max_tokens"]))):
            if index:
                await asyncio.sleep(flags.token_s * (100 if number in flags.slow else 1))
                await self._while_stalled()
            if number in flags.cut and index == 2:
                return
            await self._event(writer, {"choices": [{"index": 0, "text": f" t{index}", "finish_reason": None}]})
        prompt = body.get("prompt")
        usage = {
            "prompt_tokens": len(prompt) if isinstance(prompt, list) else 7,
            "completion_tokens": body["max_tokens"],
        }
        await self._event(writer, {"choices": [], "usage": usage})
        await self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _while_stalled(self) -> None:
        if self._stall:
            await asyncio.sleep(max(0.0, self._stall[1] - time.monotonic()))

    async def _event(self, writer: asyncio.StreamWriter, event: dict[str, object]) -> None:
        await self._chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    async def _chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await writer.drain()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--token-s", type=float, default=0.01, help="time between tokens")
    parser.add_argument("--stall-after", type=int, default=-1, help="the number of the request that begins a stall")
    parser.add_argument("--stall-s", type=float, default=2.0)
    parser.add_argument("--refuse", type=int, nargs="*", default=[], help="numbers of requests to answer with 503")
    parser.add_argument("--fail", type=int, nargs="*", default=[], help="numbers of requests to answer with 500")
    parser.add_argument("--slow", type=int, nargs="*", default=[], help="numbers of requests with 100 times --token-s")
    parser.add_argument("--cut", type=int, nargs="*", default=[], help="numbers of requests to cut after two tokens")
    stub = Stub(parser.parse_args())
    server = await asyncio.start_server(stub.serve, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
