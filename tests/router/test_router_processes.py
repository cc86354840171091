"""A router of two processes: real ones, on one port, with a fake worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tandem.v1 import worker_pb2 as pb

from kvstore.registry import Registrar
from services.cli.embedded_redis import EmbeddedRedis
from services.logs import parse_ready
from services.router.config import RouterConfig
from services.router.listening import listen
from services.router.processes.parent import Parent
from tests.router.fake_worker import FakeWorker, Reply, Script, endless, permit
from tests.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

TIMEOUT_S = 120
HELD = 9
"""So many tokens asked for: the worker waits for permits after the first."""


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@dataclass
class Several:
    """The router, and its worker."""

    parent: asyncio.subprocess.Process
    worker: FakeWorker
    held: list[asyncio.Semaphore]
    clients: AsyncExitStack = field(default_factory=AsyncExitStack)
    lines: list[str] = field(default_factory=list)
    url: str = ""

    async def read(self) -> None:
        """What it logs, to the end."""
        assert self.parent.stderr is not None
        async for line in self.parent.stderr:
            self.lines.append(line.decode())
            if (facts := parse_ready(self.lines[-1].strip())) is not None:
                self.url = str(facts["url"])

    def processes(self) -> dict[int, psutil.Process]:
        """By number."""
        return {int(each.cmdline()[-3]): each for each in psutil.Process(self.parent.pid).children()}

    async def client(self, number: int) -> httpx.AsyncClient:
        """With one connection, to that process: the others are held while it is made."""
        http = httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=1))
        await self.clients.enter_async_context(http)
        others = [each for other, each in self.processes().items() if other != number]
        for each in others:
            each.suspend()
        try:
            answer = await http.get("/health")
        finally:
            for each in others:
                each.resume()
        assert answer.headers["x-request-id"].startswith(f"p{number}-")
        return http

    async def anew(self, path: str, content: dict[str, object] | None = None) -> httpx.Response:
        """Over a connection of its own, which any process may take."""
        async with httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S) as http:
            return await (http.get(path) if content is None else http.post(path, json=content))

    async def ended(self) -> int:
        """The parent's exit status; asyncio's `wait` lasts until nobody has its standard error any more."""
        await until(lambda: self.parent.returncode is not None)
        assert self.parent.returncode is not None
        return self.parent.returncode

    async def closed(self) -> None:
        """Return once nobody has the port."""
        url = httpx.URL(self.url)
        with contextlib.suppress(ConnectionRefusedError):
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    _, writer = await asyncio.open_connection(url.host, url.port)
                    writer.close()
                    await asyncio.sleep(0.01)

    def let_go(self) -> None:
        """The streams that are held."""
        for permits in self.held:
            permit(permits, HELD)


@asynccontextmanager
async def several(make_worker, sentence) -> AsyncIterator[Several]:
    held: list[asyncio.Semaphore] = []
    usual: Reply = endless(sentence)

    def reply(request: pb.GenerateRequest) -> Script:
        script = usual(request)
        if request.sampling.max_tokens == HELD:
            script.permits = asyncio.Semaphore(1)
            held.append(script.permits)
        return script

    worker = make_worker(reply, colocated=True)
    await worker.start()
    command = [sys.executable, *["-m", "services.router", "--workers", "2", "--port", "0", "--log-format", "text"]]
    environ = {**os.environ, "TANDEM_LAUNCHER": "1", "PYTHONFAULTHANDLER": "1"}
    with EmbeddedRedis.start() as redis:
        registrar = Registrar(redis.url, worker.record(), lease_s=30)
        await registrar.start()
        parent = await asyncio.create_subprocess_exec(
            *(*command, "--redis", redis.url), stderr=asyncio.subprocess.PIPE, env=environ
        )
        stack = Several(parent, worker, held)
        reading = asyncio.create_task(stack.read())
        found: list[psutil.Process] = []
        try:
            await until(lambda: stack.url)
            found = list(stack.processes().values())
            assert len(found) == 2
            while (await stack.anew("/ready")).status_code != 200:  # noqa: ASYNC110 -- other processes'
                await asyncio.sleep(0.05)
            async with stack.clients:
                yield stack
            found += stack.processes().values() if parent.returncode is None else ()
        finally:
            if parent.returncode is None:
                parent.terminate()
            await stack.ended()
            for each in filter(lives, found):
                each.kill()
            await reading
            print("".join(stack.lines))  # shown where the test fails
            await registrar.close()
            await worker.stop()


def body(**options: object) -> dict[str, object]:
    return {"model": "tiny", "prompt": "x", "max_tokens": 3, **options}


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    """Of all processes, each series with all its labels added up."""
    answer = await http.get("/metrics")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


@asynccontextmanager
async def held_stream(http: httpx.AsyncClient, **options: object) -> AsyncIterator[AsyncIterator[str]]:
    """A stream that has had its first token, and gets the others as the worker is permitted."""
    async with http.stream("POST", "/v1/completions", json=body(max_tokens=HELD, stream=True, **options)) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        yield lines


async def rest(lines: AsyncIterator[str]) -> str:
    return "".join([line async for line in lines])


async def test_two_processes_are_one_router(make_worker, sentence):
    async with several(make_worker, sentence) as router:
        one, two = await router.client(1), await router.client(2)

        # Requests are spread: without anybody's doing, both get some, and answer.
        numbers = set()
        while len(numbers) < 2:
            answer = await router.anew("/v1/completions", body())
            assert answer.json()["usage"]["completion_tokens"] == 3
            numbers.add(answer.headers["x-request-id"][:3])
        assert numbers == {"p1-", "p2-"}

        # Counters are those of both, whichever is asked.
        before = await metrics(one)
        await one.post("/v1/completions", json=body())
        await two.post("/v1/completions", json=body())
        after = await metrics(two)
        assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 6
        assert after["vllm:time_to_first_token_seconds_count"] - before["vllm:time_to_first_token_seconds_count"] == 2
        assert (await metrics(one))["tandem:router_sessions_up"] == 1  # each has one, with the same worker
        assert len(router.worker.hellos) == 2
        assert len({hello.router_id for hello in router.worker.hellos}) == 2

        # What one has decided, the other one shows: by an id of ours, and by a client's.
        by_one = (await one.post("/v1/completions", json=body())).headers["x-request-id"]
        await one.post("/v1/completions", json=body(request_id="mine"))
        await two.post("/v1/completions", json=body(request_id="mine"))
        assert len((await two.get(f"/debug/routing/{by_one}")).json()["decisions"]) == 1
        assert len((await two.get("/debug/routing/mine")).json()["decisions"]) == 2
        assert (await two.get("/debug/routing/nobodys")).status_code == 404

        # A request at one is aborted by way of the other, at the worker, too.
        async with held_stream(one, request_id="long") as lines:
            assert (await two.get("/load")).json() == {"server_load": 1, "num_running": 1, "num_waiting": 0}
            aborted = await two.post("/abort_requests", json={"request_ids": ["long", "nobodys"]})
            assert aborted.json() == {"aborted": ["long"]}
            assert '"code":"aborted"' in await rest(lines)
        await router.worker.wait_for_abort(1)
        assert (await two.post("/abort_requests", json={"request_ids": ["long"]})).json() == {"aborted": []}

        # A process is killed: its own streams break, nobody else's, and what it has counted stays.
        counted = await metrics(two)
        victim = router.processes()[1]
        async with held_stream(two) as lines:
            async with held_stream(one) as broken:
                victim.kill()
                with pytest.raises(httpx.HTTPError):
                    await rest(broken)
            router.let_go()
            assert (await rest(lines)).endswith("[DONE]")
        for _ in range(20):  # the one that is left takes all
            assert (await router.anew("/v1/completions", body())).status_code == 200
        now = await metrics(two)
        assert {
            name for name, value in counted.items() if name.endswith(("_total", "_count")) and now[name] < value
        } == set()

        # It is mended: another one has its number, and its place.
        await until(lambda: router.processes().get(1, victim).pid != victim.pid)
        await until(lambda: any("process 1 serves again" in line for line in router.lines))
        again = await router.client(1)
        assert (await again.post("/v1/completions", json=body())).status_code == 200
        assert (await metrics(again))["vllm:generation_tokens_total"] >= now["vllm:generation_tokens_total"] + 3


async def test_sigterm_drains_both_and_leaves_nothing(make_worker, sentence):
    async with several(make_worker, sentence) as router:
        one, two, processes = await router.client(1), await router.client(2), router.processes()
        async with held_stream(one) as first, held_stream(two) as second:
            router.parent.send_signal(signal.SIGTERM)
            await router.closed()
            router.let_go()
            assert (await rest(first)).endswith("[DONE]")
            assert (await rest(second)).endswith("[DONE]")
        assert await router.ended() == 0
        assert not any(map(lives, processes.values()))
    assert "Traceback" not in "".join(router.lines)


async def test_processes_whose_parent_is_killed_finish_what_runs_and_end(make_worker, sentence):
    async with several(make_worker, sentence) as router:
        one, processes = await router.client(1), router.processes()
        async with held_stream(one) as lines:
            router.parent.kill()
            await router.ended()
            await until(lambda: not lives(processes[2]))
            await router.closed()  # another router can have the port
            router.let_go()
            assert (await rest(lines)).endswith("[DONE]")
        await until(lambda: not lives(processes[1]))


async def test_a_process_that_hangs_is_killed_and_started_again(caplog):
    config = RouterConfig(router_workers=2, redis="redis://127.0.0.1:1/0", port=0)
    with caplog.at_level("INFO"), listen("127.0.0.1", 0) as listener:
        running = asyncio.create_task(Parent(config, listener, silent_s=3.0).run())
        await until(lambda: "listening on" in caplog.text)
        hung = next(each for each in psutil.Process().children() if each.cmdline()[-3:-2] == ["1"])
        hung.suspend()
        await until(lambda: "process 1 serves again" in caplog.text)
        assert not lives(hung)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == 0


def test_what_cannot_start_ends_the_whole_with_its_status(tmp_path):
    (tmp_path / "cert.pem").write_text("none")
    flags = ["--ssl-certfile", str(tmp_path / "cert.pem"), "--ssl-keyfile", str(tmp_path / "key.pem")]
    command = [sys.executable, "-m", "services.router", "--workers", "2", "--port", "0", *flags]
    done = subprocess.run(
        [*command, "--redis", "redis://127.0.0.1:1/0"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 2
    assert str(tmp_path / "cert.pem") in done.stderr
    assert "Traceback" not in done.stderr
