"""The processes under test: two routers, two workers of each role, a store node, Redis; each keeps its address."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Final

import httpx
import redis

from services.cli.embedded_redis import find_redis_server
from tests.chaos import network
from tests.peers import PEER_SECRET
from tests.ports import free_port
from tests.stack import FORK_SERVER, run_service

TIMEOUT_S: Final = 2.0
"""Leases, and the silence after which a process is left by the others; times the fleet's patience."""
_READY_TIMEOUT_S: Final = 120.0
_PR_SET_PDEATHSIG: Final = 1


@dataclass
class Member:
    """A process that is started again under the same name, address and ports after each of its ends.

    `away`: when it was stopped or cut off, on the monotonic clock; the last one may be going on.
    """

    name: str
    role: str
    index: int
    host: str
    port: int
    argv: list[str]
    log_path: Path
    process: ForkServerProcess | None = None
    ends: list[float] = field(default_factory=list)  # when each start of it was ended, on the monotonic clock
    away: list[tuple[float, float]] = field(default_factory=list)

    @property
    def pid(self) -> int:
        assert self.process is not None
        assert self.process.pid is not None
        return self.process.pid

    @property
    def http_url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def ended_since(self, since: float) -> bool:
        """Whether it was killed or told to leave at any time from `since` on."""
        return any(time_ > since for time_ in self.ends)

    def disturbed_since(self, since: float) -> bool:
        """Whether it was killed, told to leave, stopped or cut off at any time from `since` on."""
        return self.ended_since(since) or any(end > since for _, end in self.away)

    @contextlib.contextmanager
    def gone(self) -> Iterator[None]:
        """It is stopped or cut off meanwhile."""
        began = time.monotonic()
        self.away.append((began, math.inf))
        try:
            yield
        finally:
            self.away[-1] = (began, time.monotonic())


class Fleet:
    """Started by `start_all`, ended by `close`. `with_networks`: each process has a network of its own.

    `patience`: all deadlines are so many times as long, for machines that are slow or do much else.
    """

    def __init__(self, directory: Path, model: Path, with_networks: bool, patience: float = 1.0) -> None:
        self._directory = directory
        self.with_networks = with_networks
        self.patience = patience
        self._environ = {"TANDEM_PEER_SECRET": PEER_SECRET, "TANDEM_TENANT_SECRET": secrets.token_hex(32)}
        self._password = secrets.token_hex(16)
        self._worker_environ = {"TANDEM_PROOF_KEY": secrets.token_hex(32)}
        self.http = httpx.Client(timeout=5 * patience, limits=httpx.Limits(max_keepalive_connections=0))
        self.members: dict[str, Member] = {}
        timeout = f"{TIMEOUT_S * patience:g}"
        redis_ = self._add("redis-0", ["--save", "", "--dir", str(directory), "--loglevel", "warning"])
        self.redis_url = f"redis://:{self._password}@{redis_.host}:{redis_.port}/0"
        common = ["--redis", self.redis_url, "--log-format", "text"]
        peer = [*common, "--lease-s", timeout, "--peer-timeout-s", timeout]
        worker = [*peer, "--model", str(model), "--served-model-name", "m", "--num-threads", "1"]
        worker += ["--num-gpu-blocks-override", "512", "--drain-timeout-s", f"{20 * patience:g}"]
        store = ["--store-dram-bytes", "32MiB", "--store-disk-dir", str(directory / "disk")]
        self._add("store-0", [*peer, *store, "--store-disk-bytes", "256MiB"])
        for number in range(2):
            self._add(f"prefill-{number}", [*worker, "--max-num-batched-tokens", "64"])
        for number in range(2):
            self._add(f"decode-{number}", [*worker, "--local-prefill-max-tokens", "0"])
        router = ["--silence-timeout-s", timeout, "--resume-wait-s", f"{30 * patience:g}"]
        for number in range(2):
            self._add(f"router-{number}", [*common, *router])

    def _add(self, name: str, argv: list[str]) -> Member:
        role, index = name.split("-")[0], len(self.members)
        host = network.address(index) if self.with_networks else "127.0.0.1"
        port = {kind: free_port() for kind in ("http", "grpc", "kv")}
        match role:
            case "redis":
                argv = [*argv, "--bind", host, "--port", str(port["http"]), "--requirepass", self._password]
            case "router":
                argv = [*argv, "--host", host, "--port", str(port["http"])]
            case _:
                argv = [*argv, "--host", host, "--worker-id", name]
                argv += ["--http-port", str(port["http"]), "--kv-port", str(port["kv"])]
        if role in ("prefill", "decode"):
            argv += ["--port", str(port["grpc"])]
        member = Member(name, role, index, host, port["http"], argv, self._directory / f"{name}.log")
        self.members[name] = member
        return member

    def of_role(self, role: str) -> list[Member]:
        return [member for member in self.members.values() if member.role == role]

    # ---- life ----------------------------------------------------------------

    def start_all(self) -> None:
        """Start everything and wait until both routers know every worker. Raises RuntimeError, TimeoutError."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        for member in self.members.values():
            self.start(member)
        self.wait_ready(self._check_alive)

    def start(self, member: Member) -> None:
        """Start it, empty in case of Redis, at its address."""
        environ = {**self._environ, **(self._worker_environ if member.role in ("prefill", "decode") else {})}
        args = (member.role, member.argv, str(member.log_path), environ, self.with_networks)
        member.process = FORK_SERVER.Process(target=_run, args=args, name=member.name)
        member.process.start()
        if self.with_networks:
            network.join(member.pid, member.index)

    def end(self, member: Member, number: signal.Signals) -> None:
        """Send a signal that ends the process, sooner or later."""
        member.ends.append(time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.pid, number)

    def wait_ready(self, meanwhile: Callable[[], None]) -> str:
        """Wait until every process serves and both routers know every worker; return who was the last.

        `meanwhile` is called again and again. Raises TimeoutError with the last words of one that does not serve.
        """
        deadline, last = time.monotonic() + self.patience * _READY_TIMEOUT_S, ""
        while True:
            meanwhile()
            late = [member for member in self.members.values() if not self.is_ready(member)]
            if not late:
                return last
            last = ", ".join(member.name for member in late)
            if time.monotonic() > deadline:
                tail = late[0].log_path.read_text(errors="replace")[-2000:]
                raise TimeoutError(f"{last}: not serving in time; the log of {late[0].name} ends:\n{tail}")
            time.sleep(0.1)

    def _check_alive(self) -> None:
        for member in self.members.values():
            if not member.alive:
                tail = member.log_path.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{member.name} has ended; its log ends:\n{tail}")

    def is_ready(self, member: Member) -> bool:
        if not member.alive:
            return False
        try:
            if member.role == "redis":
                return self._ask_redis("PING") is not None
            if self.http.get(f"{member.http_url}/ready").status_code != 200:
                return False
            if member.role != "router":
                return True
            known, reached = (self.metric(member, f"tandem:router_{what}") for what in ("workers_known", "sessions_up"))
            return (known, reached) == (4, 2)
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        """End all, Redis last."""
        for is_redis in (False, True):
            members = [each for each in self.members.values() if (each.role == "redis") is is_redis]
            for member in members:
                if member.alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(member.pid, signal.SIGCONT)
                        os.kill(member.pid, signal.SIGTERM)
            for member in members:
                if member.process is not None:
                    member.process.join(30)
                    if member.alive:
                        member.process.kill()
                        member.process.join()
        self.http.close()

    # ---- Redis ---------------------------------------------------------------

    def flush_redis(self) -> None:
        """Empty it, while it serves."""
        assert self._ask_redis("FLUSHALL"), "Redis does not answer"

    def _ask_redis(self, command: str) -> object:
        """Its answer, or None."""
        with redis.Redis.from_url(self.redis_url, socket_timeout=5 * self.patience) as client:
            try:
                return client.execute_command(command)
            except (redis.RedisError, OSError):
                return None

    # ---- what a process says of itself ----------------------------------------

    def metric(self, member: Member, series: str) -> float:
        """The sum of all samples of a series; an unknown one is a KeyError."""
        page = self.http.get(f"{member.http_url}/metrics").raise_for_status().text
        lines = [line for line in page.splitlines() if line.startswith((f"{series} ", f"{series}{{"))]
        if not lines and f"# TYPE {series} " not in page:
            raise KeyError(f"{member.name} has no {series}")
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def memory(self, member: Member) -> tuple[int, int]:
        """Resident bytes, and open descriptors."""
        with open(f"/proc/{member.pid}/statm", encoding="ascii") as file:
            num_pages = int(file.read().split()[1])
        return num_pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{member.pid}/fd"))


def _run(role: str, argv: list[str], log_path: str, environ: dict[str, str], with_networks: bool) -> None:
    # Whatever becomes of the run, no process of its fleet stays behind: the fork server ends with it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if with_networks:
        network.enter_alone()
    if role != "redis":
        run_service(role, argv, log_path, environ, append=True)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    server = str(find_redis_server())
    os.execv(server, [server, *argv])
