"""What one client can do to the others: small requests beside attacks, as a table in Markdown.

    python -m tests.bench.bench_attacks [--only WORD …] [--seconds 12] [--turns 3]    # paced workers
    python -m tests.bench.bench_attacks --only "n=128 and" --up-args "--prefill 1 --decode 1"

Starts `tandem up` with the demo model. The attacker is a process of its own and another client (another address),
with as many connections at a time as the attack needs, over and over. Beside it a client sends ten small requests a
second, an open loop, each measured from when it was due, and another one asks for `/health`. What the small request's
latency is compared with takes turns with the attack, so that both have the same machine: where the attack is refused,
the latency of an idle stack; where it is admitted, that beside as many tokens a second, or where there are none as many
sequences, in requests of one sequence, each from a client of its own. A row has the attacker's answers and tokens a
second, both latencies, what the median may be at most (one and a half times the other, and 100 ms), the slowest
`/health`, the processor time that the router took, for each of the attacker's answers, its most memory, then and three
seconds later, how late the small requests were sent, and how many processes wanted the machine's processors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.bench.paced import paced_flags
from tests.ports import free_port

SMALL = {"prompt": "the quick brown fox", "max_tokens": 4, "temperature": 0}
SMALL_EVERY_S = 0.1
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Attack:
    """`body` is sent to `path` by `concurrency` connections at a time, or `run` does it otherwise.

    An attack that is admitted is compared with `peers`, whose requests have one sequence, each of another client.
    """

    body: Callable[[], bytes] = lambda: b""
    path: str = COMPLETIONS
    concurrency: int = 2
    run: Callable[[int, float], Awaitable[Counter[str]]] | None = None
    peers: Attack | None = None
    is_one_client: bool = True


@dataclass
class Given:
    """What an attacker, or its peers, were given: answers by status, and tokens."""

    answers: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0

    def add(self, other: Given) -> None:
        self.answers += other.answers
        self.num_tokens += other.num_tokens


def body(**fields: object) -> Callable[[], bytes]:
    return lambda: json.dumps({"max_tokens": 16, **fields}).encode()


def ids(num: int, cycle: int = 2000) -> list[int]:
    return [100 + i % (cycle - 100) for i in range(num)]


def other_ids(num: int) -> list[int]:
    """A prompt that nobody has computed yet."""
    return random.choices(range(100, 2000), k=num)


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


async def unread(port: int, seconds: float, num: int = 24, **fields: object) -> Counter[str]:
    """Long streams that nobody reads."""
    content = body(prompt="x", max_tokens=4000, ignore_eos=True, stream=True, **fields)()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    streams = []
    for _ in range(num):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(head + content)
        writer.transport.pause_reading()
        streams.append((reader, writer))
    await asyncio.sleep(seconds)
    for _, writer in streams:
        writer.transport.abort()
    return Counter({f"{num} streams": 1})


def peers(num: int, **fields: object) -> Attack:
    """`num` clients with a request of one sequence each: a long one, so that they have as many tokens a second."""
    return Attack(
        body(prompt="x", **{"max_tokens": 256, "ignore_eos": True, **fields}), concurrency=num, is_one_client=False
    )


ATTACKS: dict[str, Attack] = {
    "64 prompts x n=128": Attack(body(prompt=["x"] * 64, n=128)),
    "256 prompts x n=128": Attack(body(prompt=["x"] * 256, n=128)),
    "1,024 sequences": Attack(body(prompt=["x"] * 64, n=16), concurrency=1, peers=peers(128)),
    "n=128, 500,000 allowed_token_ids": Attack(
        body(prompt="x", n=128, allowed_token_ids=ids(500_000)), peers=peers(128)
    ),
    "n=128, 500,000 stop_token_ids": Attack(body(prompt="x", n=128, stop_token_ids=ids(500_000)), peers=peers(128)),
    "n=128, logit_bias of the vocabulary": Attack(
        body(prompt="x", n=128, logit_bias={str(token_id): 1.0 for token_id in range(2000)}), peers=peers(128)
    ),
    "n=128 and nothing more": Attack(body(prompt="x", n=128), peers=peers(128)),
    "text of 1 MB": Attack(body(prompt="the quick brown fox " * 50_000)),
    "text of 8 MB": Attack(body(prompt="the quick brown fox " * 415_000)),
    "one word of 1 MB": Attack(body(prompt="x" * 1_000_000)),
    "chat of 60,000 messages": Attack(body(messages=[{"role": "user", "content": "x"}] * 60_000), CHAT),
    "14 MB of token ids": Attack(body(prompt=ids(2_300_000))),
    "5 MB of token ids": Attack(body(prompt=ids(900_000))),
    "1,000,000 empty lists": Attack(body(prompt=[[]] * 1_000_000)),
    "n=128, logprobs of 20": Attack(
        body(prompt="x", n=128, logprobs=20, max_tokens=32, ignore_eos=True),
        peers=peers(128, logprobs=20),
    ),
    "echo of 4,000 logprobs": Attack(
        body(prompt=ids(4000), echo=True, logprobs=20, max_tokens=1),
        peers=Attack(lambda: body(prompt=other_ids(4000), max_tokens=1)(), is_one_client=False),
    ),
    "unread streams": Attack(run=unread, peers=peers(24, max_tokens=4000, stream=True)),
    "128 unread streams, logprobs of 20": Attack(
        run=lambda port, s: unread(port, s, num=128, logprobs=20),
        peers=peers(128, max_tokens=4000, stream=True, logprobs=20),
    ),
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


def client_from(address: str, port: int, timeout_s: float) -> httpx.AsyncClient:
    """The router takes whoever comes from another address of the loopback network for another client."""
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}",
        timeout=timeout_s,
        transport=httpx.AsyncHTTPTransport(local_address=address),
    )


async def attack(port: int, chosen: Attack, seconds: float) -> Given:
    """Answers by status, with the size of the largest error."""
    if chosen.run is not None:
        return Given(await chosen.run(port, seconds))
    same = chosen.body() if chosen.is_one_client else None
    given, end = Given(), time.monotonic() + seconds
    largest = 0

    async def connection(index: int) -> None:
        nonlocal largest
        async with client_from(f"127.0.1.{1 if chosen.is_one_client else 1 + index}", port, seconds + 60) as http:
            while time.monotonic() < end:
                content = same if same is not None else chosen.body()
                try:
                    answer = await http.post(chosen.path, content=content, headers={"content-type": "application/json"})
                    given.answers[str(answer.status_code)] += 1
                    if answer.status_code >= 400:
                        largest = max(largest, len(answer.content))
                    elif tokens := re.search(rb'"completion_tokens": ?(\d+)', answer.content):
                        given.num_tokens += int(tokens[1])
                except httpx.HTTPError as error:
                    given.answers[type(error).__name__] += 1
                await asyncio.sleep(0.05)

    connections = [asyncio.create_task(connection(index)) for index in range(chosen.concurrency)]
    _, late = await asyncio.wait(connections, timeout=seconds + 5)
    for task in late:
        task.cancel()
    if late:
        given.answers["not yet"] += len(late)
        await asyncio.wait(late)
    if largest > 20_000:
        given.answers[f"{largest} bytes"] += 1
    return given


def attack_in_process(port: int, chosen: str, is_peers: bool, seconds: float, pipe: mp.connection.Connection) -> None:
    found = ATTACKS[chosen]
    pipe.send(asyncio.run(attack(port, (found.peers if is_peers else found) or found, seconds)))


@dataclass
class Seen:
    """What the other clients see, seconds, and the router's memory, bytes."""

    small_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    refused: int = 0
    rss: int = 0
    cpu_s: float = 0.0


async def watch(port: int, router: psutil.Process, seconds: float, seen: Seen) -> None:
    """Add to what has been seen."""
    start = time.monotonic()

    async def small(http: httpx.AsyncClient, due: float) -> None:
        seen.late_s.append(time.monotonic() - due)
        answer = await http.post(COMPLETIONS, json=SMALL)
        seen.small_s.append(time.monotonic() - due)
        seen.refused += answer.status_code != 200

    async def ask_small() -> None:
        async with client_from("127.0.0.1", port, 90) as http, asyncio.TaskGroup() as requests:
            for index in range(max(1, int(seconds / SMALL_EVERY_S))):
                due = start + index * SMALL_EVERY_S
                await asyncio.sleep(due - time.monotonic())
                requests.create_task(small(http, due))

    async def ask_health() -> None:
        async with client_from("127.0.0.1", port, 90) as http:
            while time.monotonic() < start + seconds:
                asked = time.monotonic()
                seen.refused += (await http.get("/health")).status_code != 200
                seen.health_s.append(time.monotonic() - asked)
                await asyncio.sleep(0.02)

    async def weigh() -> None:
        before = router.cpu_times()
        while time.monotonic() < start + seconds:
            seen.rss = max(seen.rss, router.memory_info().rss)
            await asyncio.sleep(0.05)
        after = router.cpu_times()
        seen.cpu_s += after.user + after.system - before.user - before.system

    await asyncio.gather(ask_small(), ask_health(), weigh())


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def row(name: str, seconds: float, sides: tuple[tuple[Given, Seen], tuple[Given, Seen]], rss_later: int) -> str:
    """`sides`: what the attack is compared with, and the attack; each lasted for so many `seconds` in all."""
    (with_given, with_seen), (given, seen) = sides
    with_p50, p50 = statistics.median(with_seen.small_s), statistics.median(seen.small_s)
    cells = [
        name,
        ", ".join(f"{status}: {num}" for status, num in given.answers.most_common()),
        f"{given.num_tokens / seconds:.0f} / {with_given.num_tokens / seconds:.0f}" if ATTACKS[name].peers else "",
        f"{with_p50 * 1e3:.0f} / {quantile(with_seen.small_s, 0.99) * 1e3:.0f}",
        f"{p50 * 1e3:.0f} / {quantile(seen.small_s, 0.99) * 1e3:.0f}",
        f"{(1.5 * with_p50 + 0.1) * 1e3:.0f}",
        str(seen.refused),
        f"{max(seen.health_s) * 1e3:.0f}",
        f"{seen.cpu_s / max(given.answers.total(), 1) * 1e3:.0f}",
        f"{seen.rss / 1e6:.0f}",
        f"{rss_later / 1e6:.0f}",
        f"{quantile(seen.late_s, 0.99) * 1e3:.0f}",
        f"{os.getloadavg()[0]:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "attack", "its answers", "tokens/s, its / its peers'", "small request idle or beside peers, p50 / p99 ms",
    "under attack", "allowed p50", "refused", "`/health` worst, ms", "router's ms of a core per answer", "router, MB",
    "3 s later", "sent late, p99 ms", "load",
)  # fmt: skip


def run(port: int, router: psutil.Process, only: Sequence[str], seconds: float, turns: int) -> None:
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|", flush=True)

    def beside(name: str, is_peers: bool, given: Given, seen: Seen) -> None:
        httpx.post(f"http://127.0.0.1:{port}{COMPLETIONS}", json=SMALL, timeout=300)  # the one before is over
        if is_peers and ATTACKS[name].peers is None:
            asyncio.run(watch(port, router, seconds / turns, seen))
            return
        ours, theirs = mp.Pipe()
        process = mp.Process(target=attack_in_process, args=(port, name, is_peers, seconds / turns, theirs))
        process.start()
        asyncio.run(watch(port, router, seconds / turns, seen))
        given.add(ours.recv())
        process.join()

    for name in ATTACKS:
        if not any(word in name for word in only):
            continue
        compared, attacked = (Given(), Seen()), (Given(), Seen())
        for _ in range(turns):
            beside(name, True, *compared)
            beside(name, False, *attacked)
        time.sleep(3)
        print(row(name, seconds, (compared, attacked), router.memory_info().rss), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", default=[""], help="attacks whose name has one of these words")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each attack, and of what it is compared with")
    parser.add_argument("--turns", type=int, default=3, help="of both")
    parser.add_argument("--up-args", default="", help="flags of `tandem up` in the place of paced workers")
    options = parser.parse_args(argv)
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        flags = shlex.split(options.up_args) if options.up_args else paced_flags(Path(directory))
        command = [sys.executable, "-m", "services.cli.main", "up", "--port", str(port), *flags]
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
