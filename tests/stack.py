"""A whole Tandem on this machine for the end-to-end tests: real processes, real Redis, real sockets, real UCX.

Workers are forked from a server process that has imported torch but opened nothing, so that a stack starts in about a
second instead of ten; each then runs the very `main` that the command line runs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import httpx
import redis

from kvstore.registry import WorkerRecord
from kvstore.registry.worker_record import decode_record
from services.cli.embedded_redis import EmbeddedRedis
from services.engine.choice import modules_of
from services.secrets import make_secret_file
from tests import broken_steps
from tests.peers import AUTHORIZATION, PEER_SECRET

_READY_TIMEOUT_S = 240.0
_STOP_TIMEOUT_S = 20.0
_HTTP_TIMEOUT_S = 30.0

Flags = str | Sequence[str]
"""Words of a command line, or a string of them."""

FORK_SERVER = multiprocessing.get_context("forkserver")


def preload(*engines: str) -> None:
    """Have the fork server import what these engines need beside the rest; before the first process of it."""
    # Nothing that starts threads or opens UCX or gRPC when imported.
    FORK_SERVER.set_forkserver_preload(
        [*(name for each in engines for name in modules_of(each)), "tests.stack_preload"]
    )


preload()


@dataclass
class Service:
    """One process of the stack."""

    name: str
    role: str
    argv: list[str]
    log_path: Path
    process: ForkServerProcess
    debug_url: str = ""

    @property
    def log(self) -> str:
        """What it has said so far; one that was just forked has no file yet."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""


@dataclass
class Stack:
    """Start with `with Stack(...) as stack`; the router's URL is `stack.url`."""

    directory: Path
    prefill: Sequence[Flags] = ()  # extra flags of each prefill worker
    decode: Sequence[Flags] = ("",)
    elastic: Sequence[Flags] = ()  # extra flags of each elastic worker
    store: Sequence[Flags] = ()  # extra flags of each store node; {disk} in them is `disk`
    router: Flags = ""
    worker: Flags = ""  # extra flags of every worker
    model: Path = Path()  # which every worker serves as "m"
    engine: str = "native"
    environ: dict[str, str] = field(default_factory=dict)
    patience_s: float = _READY_TIMEOUT_S  # how long anything is waited for
    services: dict[str, Service] = field(default_factory=dict)

    def __enter__(self) -> Stack:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.redis = EmbeddedRedis.start()
        # One for all questions: making a client takes 20 times the CPU time of a question, which the workers lack.
        # Each has a connection of its own, which nobody but us ends.
        self._http = httpx.Client(timeout=_HTTP_TIMEOUT_S, limits=httpx.Limits(max_keepalive_connections=0))
        try:
            common = self.common
            proof_key = self.directory / "proof-key"
            make_secret_file(proof_key)
            model = ["--num-threads", "1", "--model", str(self.model), "--served-model-name", "m"]
            model += ["--engine", self.engine]
            model += ["--proof-key-file", str(proof_key)]
            for role, workers in (("prefill", self.prefill), ("decode", self.decode), ("elastic", self.elastic)):
                for index, flags in enumerate(workers):
                    self.start(f"{role}-{index}", role, [*common, *model, *_words(self.worker), *_words(flags)])
            for index, flags in enumerate(self.store):
                self.start(
                    f"store-{index}",
                    "store",
                    [*common, *(word.replace("{disk}", str(self.disk)) for word in _words(flags))],
                )
            self.start("router", "router", [*common, "--port", "0", "--model-grace-s", "0", *_words(self.router)])
            self.wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for service in reversed(self.services.values()):
            if service.process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # just dead, which its parent does not know yet
                    os.kill(service.process.pid or 0, signal.SIGCONT)
                service.process.terminate()
        for service in self.services.values():
            service.process.join(_STOP_TIMEOUT_S)
            if service.process.is_alive():
                service.process.kill()
                service.process.join()
        self._http.close()
        self.redis.close()

    @property
    def disk(self) -> Path:
        """Where a store node keeps its files."""
        return self.directory / "disk"

    @property
    def common(self) -> list[str]:
        """The flags of every process."""
        return ["--redis", self.redis.url, "--log-format", "text"]

    def restart(self, *names: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Kill workers or store nodes, start them anew with the same flags, and wait until they are registered.

        `meanwhile` is called while all of them are down.
        """
        old = {record.worker_id: record.incarnation for record in self.records()}
        for name in names:
            self.services[name].process.kill()
        for name in names:
            self.services[name].process.join(_STOP_TIMEOUT_S)
        meanwhile()
        for name in names:
            service = self.services[name]
            self.start(name, service.role, service.argv[: service.argv.index("--worker-id")])

        def are_back() -> bool:
            found = [r for r in self.records() if r.worker_id in names and r.incarnation != old.get(r.worker_id)]
            for record in found:
                self.services[record.worker_id].debug_url = f"http://{record.http_address}"
            return len(found) == len(names)

        self.wait_for(are_back, f"{', '.join(names)} to announce themselves again")

    def kill_redis(self) -> None:
        """End Redis as a crash would; `start_redis` starts an empty one at the same address."""
        os.kill(self.redis.pid, signal.SIGKILL)
        self.redis.close()

    def start_redis(self) -> None:
        self.redis = self.redis.start_again()

    def start(self, name: str, role: str, argv: list[str], worker_id: str = "") -> Service:
        """Start a process of that role; a worker announces itself under `worker_id`, or else under `name`."""
        if role != "router":
            argv = [*argv, "--worker-id", worker_id or name]
        log_path = self.directory / f"{name}.log"
        environ = {"TANDEM_PEER_SECRET": PEER_SECRET, **self.environ}
        process = FORK_SERVER.Process(target=run_service, args=(role, argv, str(log_path), environ), name=name)
        process.start()
        service = Service(name, role, argv, log_path, process)
        self.services[name] = service
        return service

    def wait_ready(self) -> None:
        """Until the router serves a model and every worker is up; raises with the log of whatever died."""
        workers = {name: service for name, service in self.services.items() if service.role != "router"}
        self.wait_for(lambda: len(self.records()) == len(workers), "every worker to announce itself")
        for record in self.records():
            workers[record.worker_id].debug_url = f"http://{record.http_address}"
        router = self.services["router"]
        self.wait_for(lambda: re.search(r'listening on ([^\s"]+)', router.log) is not None, "the router to listen")
        self.url = re.findall(r'listening on ([^\s"]+)', router.log)[-1]
        self.wait_for(lambda: self._http.get(f"{self.url}/ready").status_code == 200, "the router to be ready")
        self.wait_for(self._router_has_all, "the router to have every worker, as it was started last")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline, pause_s = time.monotonic() + self.patience_s, 0.02
        while True:
            for service in self.services.values():
                if service.process.exitcode not in (None, 0, -signal.SIGKILL):
                    raise RuntimeError(f"{service.name} ended with {service.process.exitcode}:\n{service.log[-4000:]}")
            try:
                if condition():
                    return
            except httpx.HTTPError:
                pass  # not up yet
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {service.name}\n{service.log[-2000:]}" for service in self.services.values())
                raise TimeoutError(f"waited {self.patience_s:g} s for {what}\n{logs}")
            time.sleep(pause_s)
            pause_s = min(1.2 * pause_s, 0.1)  # asking takes time of the processors that they wait for

    def records(self) -> list[WorkerRecord]:
        """What the workers that serve announce in the registry."""
        with redis.Redis.from_url(self.redis.url, socket_timeout=60) as client:
            records = [decode_record(data) for data in client.hgetall("{tandem}:workers").values()]
        return [record for record in records if not record.phase]

    def _router_has_all(self) -> bool:
        """Whether the router knows this start of every worker and, of those that decode, has a session with it."""
        listed = self._http.get(f"{self.url}/debug/workers").raise_for_status().json()["workers"]
        usable = {(each["worker_id"], each["incarnation"]) for each in listed if each["connected"]}
        return {(record.worker_id, record.incarnation) for record in self.records() if record.role != "store"} <= usable

    def debug_state(self, name: str) -> dict[str, object]:
        response = self._http.get(f"{self.services[name].debug_url}/debug/state", headers=AUTHORIZATION)
        response.raise_for_status()
        return dict(response.json())

    def metrics(self, name: str) -> str:
        """A process's page of metrics."""
        service = self.services[name]
        response = self._http.get(f"{self.url if service.role == 'router' else service.debug_url}/metrics")
        response.raise_for_status()
        return response.text

    def metric(self, name: str, series: str, **labels: str) -> float:
        """The sum of a process's samples of one series. `labels`: only samples that have these; 0 if none has them yet.

        A series that the process does not export at all is an error, not 0: its name is wrong.
        """
        text = self.metrics(name)
        assert re.search(rf"^# TYPE {re.escape(series)} ", text, re.MULTILINE), f"{name} has no {series}"
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        samples = re.findall(rf"^{re.escape(series)}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
        return sum(float(value) for found, value in samples if wanted <= set(found.split(",")))

    def wait_index_follows(self) -> None:
        """Until the index says what the caches hold, as of now, and the router has it: it may lose it for a while.

        What store nodes are yet to fetch is no part of it.
        """
        names = [service.name for service in self.services.values() if service.role != "router"]
        for name in names:
            self._check_integrity(name)  # between two turns of the engine: what came of those before has been told

        def is_synced() -> bool:
            states = map(self.debug_state, names)
            if not all(dict(state["index"])["synced"] for state in states):  # type: ignore[call-overload]
                return False
            return "router" not in self.services or self.metric("router", "tandem:router_index_up") == 1

        self.wait_for(is_synced, "the index to follow")

    def check_clean(self) -> None:
        """Every worker comes to rest with all its blocks free, and its pool's books are right."""
        for service in self.services.values():
            if service.role not in ("prefill", "decode", "elastic"):
                continue
            # One that a test has killed may be dying still, or dead without its parent knowing.
            self.wait_for(
                lambda name=service.name, process=service.process: not process.is_alive() or self._is_at_rest(name),
                f"{service.name} to rest",
            )
            if service.process.is_alive():
                self._check_integrity(service.name)

    def _check_integrity(self, name: str) -> None:
        """Have a worker's engine, or a store node, look at its books."""
        response = self._http.get(f"{self.services[name].debug_url}/debug/integrity", headers=AUTHORIZATION)
        assert response.status_code == 200, f"{name}: {response.text}"

    def _is_at_rest(self, name: str) -> bool:
        """As the engine says and as the metrics say; a store node that reads late may come between the two."""
        blocks = re.findall(r"^tandem:kv_blocks(?:_free)?{.*} (.*)$", self.metrics(name), re.MULTILINE)
        assert len(blocks) == 2, f"{name}: {blocks}"
        engine = self.debug_state(name)["engine"]
        assert isinstance(engine, dict)
        return (
            blocks[0] == blocks[1]
            and engine["num_free_blocks"] == engine["num_blocks"]
            and engine["num_running"] == engine["num_waiting"] == engine["num_lent_blocks"] == 0
        )


def _words(flags: Flags) -> Sequence[str]:
    return flags.split() if isinstance(flags, str) else flags


def run_service(role: str, argv: list[str], log_path: str, environ: dict[str, str], append: bool = False) -> None:
    """Be that process, as a fork of the server; what it prints goes to a file, after what is there if `append`."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC))
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environ)
    if broken_steps.ENGINE in environ and role in ("prefill", "decode", "elastic"):
        broken_steps.break_at_signal()
    if role == "router":
        from services.router.__main__ import main
    elif role == "prefill":
        from services.prefill.__main__ import main
    elif role == "elastic":
        from services.elastic.__main__ import main
    elif role == "store":
        from services.store.__main__ import main
    else:
        from services.decode.__main__ import main
    sys.exit(main(argv))
