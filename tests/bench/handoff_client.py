"""The clients of `bench_handoff`: one prompt and its receipt; streams that run, and the gaps in them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

_PATH: Final = "/v1/completions"
_STREAM_TOKENS: Final = 7000
_WARM_GAPS: Final = 30  # of each stream, until all run and nothing is new


@dataclass(frozen=True)
class Handoff:
    """One prompt's way to its second worker."""

    num_blocks: int
    read_s: float
    confirm_s: float
    join_s: float
    ttft_s: float


async def handed_off(client: httpx.AsyncClient, prompt: Sequence[int]) -> Handoff:
    """Have a prompt prefilled by one worker and decoded by the other. Raises SystemExit where it was not."""
    body = {"prompt": list(prompt), "max_tokens": 3, "temperature": 0, "ignore_eos": True, "receipt": True}
    answer = await client.post(_PATH, json=body)
    if answer.status_code != 200:
        raise SystemExit(f"{answer.status_code}: {answer.text[:500]}")
    receipt = answer.json()["receipt"]["sequences"][0]
    at: dict[str, float] = receipt["unix_seconds"]
    if receipt["prefilled_locally"] or "handoff_confirmed" not in at:
        raise SystemExit(f"a prompt of {len(prompt)} tokens was not handed off: {receipt}")
    return Handoff(
        num_blocks=receipt["handoff"]["blocks"],
        read_s=at["blocks_read"] - at["prefill_finished"],
        confirm_s=at["handoff_confirmed"] - at["blocks_read"],
        join_s=at["decode_joined"] - at["handoff_confirmed"],
        ttft_s=at["first_token"] - at["arrived"],
    )


class Streams:
    """So many streams without end, read with little effort: their chunks are counted, and not parsed."""

    def __init__(self, url: str, num_streams: int, make_prompt: Callable[[], Sequence[int]]) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "", parts.port or 80
        self._num_streams = num_streams
        self._make_prompt = make_prompt
        self._gaps: list[float] = []
        self._num_seen = [0] * num_streams
        self._all_run = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Streams:
        self._tasks = [asyncio.create_task(self._read(number)) for number in range(self._num_streams)]
        waiting = asyncio.create_task(self._all_run.wait())
        await asyncio.wait([waiting, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            raise SystemExit("a stream has ended before all had begun")
        self.take_gaps()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def take_gaps(self) -> list[float]:
        """Seconds between two chunks of one stream, of all of them, since the last call."""
        taken, self._gaps = self._gaps, []
        return taken

    async def _read(self, number: int) -> None:
        while True:  # as long as somebody wants it: a stream ends where the context does
            last_s: float | None = None
            reader, writer = await asyncio.open_connection(*self._address)
            try:
                writer.write(self._request())
                async for line in reader:
                    if not line.startswith(b"data: {"):
                        if line.startswith(b"data: [DONE]"):
                            break
                        continue
                    now_s = time.perf_counter()
                    if last_s is not None:
                        self._gaps.append(now_s - last_s)
                        self._num_seen[number] += 1
                        if min(self._num_seen) >= _WARM_GAPS:
                            self._all_run.set()
                    last_s = now_s
            finally:
                writer.close()

    def _request(self) -> bytes:
        body: dict[str, Any] = {"prompt": list(self._make_prompt()), "max_tokens": _STREAM_TOKENS, "stream": True}
        content = json.dumps(body | {"temperature": 0, "ignore_eos": True}).encode()
        host = ":".join(map(str, self._address))
        head = [f"POST {_PATH} HTTP/1.1", f"Host: {host}", "Connection: close", "Content-Type: application/json"]
        return "\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest one of `values`."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]
