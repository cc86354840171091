"""What one client can do to the others: small requests beside attacks, as a table in Markdown.

    python -m tests.bench.bench_attacks [--only WORD …] [--seconds 8] [--turns 3] [--up-args "--no-demo ..."]

Starts `tandem up` with the demo model. The attacker is a process of its own, with as many connections at a time as the
attack needs, over and over. Beside it one client asks a small request every 50 ms and another `/health`. Idle times and
attacks take turns, so that both have the same machine. A row has the attacker's answers, the small request's latency
idle and under attack, what that may be at most (one and a half times the idle median, and 100 ms), the slowest
`/health`, the processor time that the router took, for each of the attacker's answers, its most memory, then and three
seconds later, and how many processes wanted the machine's processors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import psutil

from tests.ports import free_port

SMALL = {"prompt": "the quick brown fox", "max_tokens": 4, "temperature": 0}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Attack:
    """`body` is sent to `path` by `concurrency` connections at a time, or `run` does it otherwise."""

    body: Callable[[], bytes] = lambda: b""
    path: str = COMPLETIONS
    concurrency: int = 2
    run: Callable[[int, float], Awaitable[Counter[str]]] | None = None


def body(**fields: object) -> Callable[[], bytes]:
    return lambda: json.dumps({"max_tokens": 16, **fields}).encode()


def ids(num: int, cycle: int = 2000) -> list[int]:
    return [100 + i % (cycle - 100) for i in range(num)]


async def silent(port: int, seconds: float, *, said: bytes, num: int) -> Counter[str]:
    """Connections that say so much and no more, for 20 s at least; what they got until the server ended them."""

    async def connect() -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(said)
        try:
            async with asyncio.timeout(max(seconds, 20)):
                answer = await reader.read()
            return answer.split()[1].decode() if answer else "closed"
        except TimeoutError:
            return "open"
        except ConnectionError:
            return "closed"
        finally:
            writer.close()

    return Counter(await asyncio.gather(*(connect() for _ in range(num))))


async def unread(port: int, seconds: float) -> Counter[str]:
    """Long streams that nobody reads."""
    content = json.dumps({"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    streams = []
    for _ in range(24):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(head + content)
        writer.transport.pause_reading()
        streams.append((reader, writer))
    await asyncio.sleep(seconds)
    for _, writer in streams:
        writer.transport.abort()
    return Counter({"24 streams": 1})


ATTACKS: dict[str, Attack] = {
    "64 prompts x n=128": Attack(body(prompt=["x"] * 64, n=128)),
    "256 prompts x n=128": Attack(body(prompt=["x"] * 256, n=128)),
    "1,024 sequences": Attack(body(prompt=["x"] * 64, n=16), concurrency=1),
    "the same, 64 at a time": Attack(body(prompt="x", n=1), concurrency=64),
    "n=128, 500,000 allowed_token_ids": Attack(body(prompt="x", n=128, allowed_token_ids=ids(500_000))),
    "n=128, 500,000 stop_token_ids": Attack(body(prompt="x", n=128, stop_token_ids=ids(500_000))),
    "n=128, logit_bias of the vocabulary": Attack(
        body(prompt="x", n=128, logit_bias={str(token_id): 1.0 for token_id in range(2000)})
    ),
    "n=128 and nothing more": Attack(body(prompt="x", n=128)),
    "text of 1 MB": Attack(body(prompt="the quick brown fox " * 50_000)),
    "text of 8 MB": Attack(body(prompt="the quick brown fox " * 415_000)),
    "one word of 1 MB": Attack(body(prompt="x" * 1_000_000)),
    "chat of 60,000 messages": Attack(body(messages=[{"role": "user", "content": "x"}] * 60_000), CHAT),
    "14 MB of token ids": Attack(body(prompt=ids(2_300_000))),
    "5 MB of token ids": Attack(body(prompt=ids(900_000))),
    "1,000,000 empty lists": Attack(body(prompt=[[]] * 1_000_000)),
    "n=128, logprobs of 20": Attack(body(prompt="x", n=128, logprobs=20, max_tokens=32, ignore_eos=True)),
    "echo of 4,000 logprobs": Attack(body(prompt=ids(4000), echo=True, logprobs=20, max_tokens=1)),
    "unread streams": Attack(run=unread),
    "header of 1 MB": Attack(run=lambda port, s: silent(
        port, s, said=b"GET /health HTTP/1.1\r\nX-A: " + b"x" * 1_000_000 + b"\r\n\r\n", num=8)),
    "URL of 50 KB": Attack(run=lambda port, s: silent(
        port, s, said=b"GET /" + b"x" * 50_000 + b" HTTP/1.1\r\nConnection: close\r\n\r\n", num=8)),
    "model name of 1 MB": Attack(body(prompt="x", model="x" * 1_000_000)),
    "100,000 deep": Attack(lambda: b'{"prompt": ' + b"[" * 100_000),
    "270 silent connections": Attack(run=lambda port, s: silent(port, s, said=b"", num=270)),
    "200 bodies that do not come": Attack(run=lambda port, s: silent(
        port, s, said=b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{", num=200)),
}  # fmt: skip


async def attack(port: int, chosen: Attack, seconds: float) -> Counter[str]:
    """Answers by status, with the size of the largest."""
    if chosen.run is not None:
        return await chosen.run(port, seconds)
    content, answers, end = chosen.body(), Counter[str](), time.monotonic() + seconds
    largest = 0

    async def client() -> None:
        nonlocal largest
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=seconds + 60) as http:
            while time.monotonic() < end:
                try:
                    answer = await http.post(chosen.path, content=content, headers={"content-type": "application/json"})
                    answers[str(answer.status_code)] += 1
                    if answer.status_code >= 400:
                        largest = max(largest, len(answer.content))
                except httpx.HTTPError as error:
                    answers[type(error).__name__] += 1
                await asyncio.sleep(0.05)

    clients = [asyncio.create_task(client()) for _ in range(chosen.concurrency)]
    _, late = await asyncio.wait(clients, timeout=seconds + 5)
    for task in late:
        task.cancel()
    if late:
        answers["none"] += len(late)
        await asyncio.wait(late)
    if largest > 20_000:
        answers[f"{largest} bytes"] += 1
    return answers


def attack_in_process(port: int, name: str, seconds: float, pipe: mp.connection.Connection) -> None:
    pipe.send(asyncio.run(attack(port, ATTACKS[name], seconds)))


@dataclass
class Seen:
    """What the other clients see, seconds, and the router's memory, bytes."""

    small_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    refused: int = 0
    rss: int = 0
    cpu_s: float = 0.0


async def watch(port: int, router: psutil.Process, seconds: float, seen: Seen) -> None:
    """Add to what has been seen."""
    end = time.monotonic() + seconds

    async def ask(times: list[float], method: str, path: str, pause_s: float, content: object = None) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=90) as http:
            is_first = True
            while is_first or time.monotonic() < end:
                is_first, start = False, time.monotonic()
                answer = await http.request(method, path, json=content)
                times.append(time.monotonic() - start)
                seen.refused += answer.status_code != 200
                await asyncio.sleep(pause_s)

    async def weigh() -> None:
        before = router.cpu_times()
        while time.monotonic() < end:
            seen.rss = max(seen.rss, router.memory_info().rss)
            await asyncio.sleep(0.05)
        after = router.cpu_times()
        seen.cpu_s += after.user + after.system - before.user - before.system

    await asyncio.gather(
        ask(seen.small_s, "POST", COMPLETIONS, 0.05, SMALL), ask(seen.health_s, "GET", "/health", 0.02), weigh()
    )


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def row(name: str, answers: Counter[str], idle: Seen, seen: Seen, rss_later: int) -> str:
    told = ", ".join(f"{status}: {num}" for status, num in answers.most_common())
    idle_p50, p50 = statistics.median(idle.small_s), statistics.median(seen.small_s)
    cells = [
        name,
        told,
        f"{idle_p50 * 1e3:.0f} / {quantile(idle.small_s, 0.99) * 1e3:.0f}",
        f"{p50 * 1e3:.0f} / {quantile(seen.small_s, 0.99) * 1e3:.0f}",
        f"{(1.5 * idle_p50 + 0.1) * 1e3:.0f}",
        str(seen.refused),
        f"{max(seen.health_s) * 1e3:.0f}",
        f"{seen.cpu_s / max(answers.total(), 1) * 1e3:.0f}",
        f"{seen.rss / 1e6:.0f}",
        f"{rss_later / 1e6:.0f}",
        f"{os.getloadavg()[0]:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "attack", "its answers", "small request idle, p50 / p99 ms", "under attack", "allowed p50", "refused",
    "`/health` worst, ms", "router's ms of a core per answer", "router, MB", "3 s later", "load",
)  # fmt: skip


def run(port: int, router: psutil.Process, only: Sequence[str], seconds: float, turns: int) -> None:
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|", flush=True)
    for name in ATTACKS:
        if not any(word in name for word in only):
            continue
        idle, seen, answers = Seen(), Seen(), Counter[str]()
        for _ in range(turns):
            httpx.post(f"http://127.0.0.1:{port}{COMPLETIONS}", json=SMALL, timeout=300)  # the one before is over
            asyncio.run(watch(port, router, seconds / turns, idle))
            ours, theirs = mp.Pipe()
            attacker = mp.Process(target=attack_in_process, args=(port, name, seconds / turns, theirs))
            attacker.start()
            asyncio.run(watch(port, router, seconds / turns, seen))
            answers += ours.recv()
            attacker.join()
        time.sleep(3)
        print(row(name, answers, idle, seen, router.memory_info().rss), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", default=[""], help="attacks whose name has one of these words")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--turns", type=int, default=3, help="of idling and attacking")
    parser.add_argument("--up-args", default="")
    options = parser.parse_args(argv)
    port = free_port()
    command = [sys.executable, "-m", "services.cli.main", "up", "--port", str(port), *shlex.split(options.up_args)]
    up = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with suppress(httpx.HTTPError):
                if httpx.post(f"http://127.0.0.1:{port}{COMPLETIONS}", json=SMALL).status_code == 200:
                    break
            time.sleep(0.2)
        (router,) = [
            process
            for process in psutil.Process(up.pid).children(recursive=True)
            if "services.router" in " ".join(process.cmdline())
        ]
        run(port, router, options.only, options.seconds, options.turns)
    finally:
        up.terminate()
        up.wait(60)


if __name__ == "__main__":
    main()
