"""The processes under test: two routers, two workers of each role, a store node, Redis; each keeps its address."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import httpx
import redis

from services.cli.embedded_redis import find_redis_server
from tests.chaos import network
from tests.peers import PEER_SECRET
from tests.ports import free_port
from tests.stack import FORK_SERVER, run_service

READY_TIMEOUT_S = 120.0
_LEASE_S, _PEER_TIMEOUT_S = 2, 2


@dataclass
class Member:
    """A process that is started again under the same name, address and ports after each of its ends."""

    name: str
    role: str
    index: int
    host: str
    argv: list[str]
    http_url: str
    log_path: Path
    process: ForkServerProcess | None = None
    ends: list[float] = field(default_factory=list)  # when each start of it was ended, on the monotonic clock
    cut: bool = False

    @property
    def pid(self) -> int:
        assert self.process is not None
        assert self.process.pid is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()


class Fleet:
    """Started by `start_all`, ended by `close`. `with_networks`: each process has a network of its own."""

    def __init__(self, directory: Path, model: Path, with_networks: bool) -> None:
        self._directory = directory
        self.with_networks = with_networks
        self._hub = network.HUB if with_networks else "127.0.0.1"
        self._redis_port = free_port()
        self._password = secrets.token_hex(16)
        self.redis_url = f"redis://:{self._password}@{self._hub}:{self._redis_port}/0"
        self._environ = {"TANDEM_PEER_SECRET": PEER_SECRET, "TANDEM_TENANT_SECRET": secrets.token_hex(32)}
        self._worker_environ = {"TANDEM_PROOF_KEY": secrets.token_hex(32)}
        self._redis: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(timeout=5, limits=httpx.Limits(max_keepalive_connections=0))
        self.members: dict[str, Member] = {}
        common = ["--redis", self.redis_url, "--log-format", "text"]
        model_flags = ["--model", str(model), "--served-model-name", "m", "--num-threads", "1"]
        worker = [*model_flags, "--num-gpu-blocks-override", "512", "--lease-s", str(_LEASE_S)]
        worker += ["--peer-timeout-s", str(_PEER_TIMEOUT_S), "--drain-timeout-s", "20"]
        store = ["--store-dram-bytes", "32MiB", "--store-disk-dir", str(directory / "disk")]
        store += ["--store-disk-bytes", "256MiB", "--lease-s", str(_LEASE_S), "--peer-timeout-s", str(_PEER_TIMEOUT_S)]
        for name, argv in (
            ("store-0", store),
            ("prefill-0", [*worker, "--max-num-batched-tokens", "64"]),
            ("prefill-1", [*worker, "--max-num-batched-tokens", "64"]),
            ("decode-0", [*worker, "--local-prefill-max-tokens", "0"]),
            ("decode-1", [*worker, "--local-prefill-max-tokens", "0"]),
            ("router-0", []),
            ("router-1", []),
        ):
            self._add(name, [*common, *argv])

    def _add(self, name: str, argv: list[str]) -> None:
        role, index = name.split("-")[0], len(self.members)
        host = network.address(index) if self.with_networks else "127.0.0.1"
        port = {kind: free_port() for kind in ("http", "grpc", "kv")}
        argv = [*argv, "--host", host]
        if role == "router":
            argv += ["--port", str(port["http"])]
        else:
            argv += ["--http-port", str(port["http"]), "--kv-port", str(port["kv"]), "--worker-id", name]
        if role in ("prefill", "decode"):
            argv += ["--port", str(port["grpc"])]
        url = f"http://{host}:{port['http']}"
        self.members[name] = Member(name, role, index, host, argv, url, self._directory / f"{name}.log")

    def of_role(self, role: str) -> list[Member]:
        return [member for member in self.members.values() if member.role == role]

    # ---- life ----------------------------------------------------------------

    def start_all(self) -> None:
        """Start everything and wait until both routers know every worker."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        self.start_redis()
        for member in self.members.values():
            self.start(member)
        self.wait_ready()

    def start(self, member: Member) -> None:
        environ = {**self._environ, **(self._worker_environ if member.role in ("prefill", "decode") else {})}
        args = (member.role, member.argv, str(member.log_path), environ, self.with_networks)
        member.process = FORK_SERVER.Process(target=_run, args=args, name=member.name)
        member.process.start()
        member.cut = False
        if self.with_networks:
            network.join(member.pid, member.index)

    def end(self, member: Member, number: signal.Signals) -> None:
        """Send a signal that ends the process, sooner or later."""
        member.ends.append(time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.pid, number)

    def wait_ready(self) -> None:
        """Until every process serves and both routers know every worker. Raises TimeoutError with the last words."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while missing := [member for member in self.members.values() if not self.is_ready(member)]:
            if time.monotonic() > deadline:
                tail = missing[0].log_path.read_text(errors="replace")[-2000:]
                raise TimeoutError(f"{[member.name for member in missing]} do not serve; the first's log ends:\n{tail}")
            time.sleep(0.1)

    def is_ready(self, member: Member) -> bool:
        try:
            if self.http.get(f"{member.http_url}/ready").status_code != 200:
                return False
            if member.role != "router":
                return True
            known, reached = (self.metric(member, f"tandem:router_{what}") for what in ("workers_known", "sessions_up"))
            return (known, reached) == (4, 2)
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        for member in self.members.values():
            if member.alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGCONT)
                    os.kill(member.pid, signal.SIGTERM)
        for member in self.members.values():
            if member.process is not None:
                member.process.join(30)
                if member.alive:
                    member.process.kill()
                    member.process.join()
        self.http.close()
        self.kill_redis()

    # ---- Redis ---------------------------------------------------------------

    def start_redis(self) -> None:
        """Start an empty one at its address."""
        flags = ["--port", str(self._redis_port), "--bind", self._hub, "--save", "", "--dir", str(self._directory)]
        server = [str(find_redis_server()), *flags, "--requirepass", self._password]
        with open(self._directory / "redis.log", "ab") as log:
            self._redis = subprocess.Popen(server, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def signal_redis(self, number: signal.Signals) -> None:
        assert self._redis is not None
        self._redis.send_signal(number)

    def kill_redis(self) -> None:
        if self._redis is not None:
            self._redis.kill()
            self._redis.wait()

    def flush_redis(self) -> None:
        with redis.Redis.from_url(self.redis_url, socket_timeout=10) as client:
            client.flushall()

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
    if with_networks:
        network.enter_alone()
    run_service(role, argv, log_path, environ, append=True)
