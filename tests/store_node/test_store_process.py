"""A store node's process before, during and after its time as a node, as whoever probes it over HTTP sees it."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from kvstore.registry import Registrar
from services.cli.embedded_redis import EmbeddedRedis
from tests.store_node.store_world import LAYOUT
from tests.worker_records import worker_record

WORKER = worker_record(
    role="decode", model_fingerprint=LAYOUT.model_fingerprint, block_size=LAYOUT.block_size, layout=LAYOUT.to_wire()
)


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    redis = EmbeddedRedis.start()
    yield redis.url
    redis.close()


class StoreProcess:
    """A store node that was started; its log is `log_path`."""

    def __init__(self, redis_url: str, log_path: Path, *flags: str, program: Sequence[str]) -> None:
        self._log_path = log_path
        command = [sys.executable, *program, "--redis", redis_url, "--worker-id", "store-0", *flags]
        with log_path.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log)
        # One for all questions: making one takes more time than a question, which the process lacks.
        self._http = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
        self.wait_for(lambda: "debug http://" in self.log, "it to listen")
        (self.url, *_) = re.findall(r"debug (http://[\w.:]+)", self.log)

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def get(self, path: str) -> httpx.Response:
        return self._http.get(f"{self.url}{path}")

    def kill(self) -> None:
        self._http.close()
        self.process.kill()
        self.process.wait()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 150
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, f"waited for {what}:\n{self.log}"
            time.sleep(0.05)


@contextmanager
def store_process(
    redis_url: str, log_path: Path, *flags: str, program: Sequence[str] = ("-m", "services.store")
) -> Iterator[StoreProcess]:
    store = StoreProcess(redis_url, log_path, *flags, program=program)
    try:
        yield store
    finally:
        store.kill()


async def test_a_node_lives_from_its_start_and_is_ready_when_a_worker_has_come(redis_url: str, tmp_path: Path) -> None:
    with store_process(redis_url, tmp_path / "log", "--served-model-name", "m") as store:
        assert store.get("/health").status_code == 200
        early = store.get("/ready")
        assert (early.status_code, early.json()["reason"]) == (503, "waiting for a worker of m")
        metrics = store.get("/metrics").text
        assert "tandem:store_blocks" not in metrics
        store.wait_for(lambda: 'tandem:registry_up{role="store"} 1.0' in store.get("/metrics").text, "the registry")
        assert store.get("/debug/integrity").json() == {"ok": True}
        state = {"worker_id": "store-0", "role": "store", "not_ready": "waiting for a worker of m", "stuck": ""}
        assert store.get("/debug/state").json() == state

        registrar = Registrar(redis_url, WORKER)
        await registrar.start()
        await asyncio.to_thread(store.wait_for, lambda: store.get("/ready").status_code == 200, "it to be ready")
        await registrar.close()
        assert store.get("/ready").json() == {"status": "ready"}
        assert store.get("/health").status_code == 200
        assert 'tandem:store_blocks{role="store",tier="dram"} 0.0' in store.get("/metrics").text
        assert (store.get("/debug/state").json()["not_ready"], store.get("/debug/integrity").json()) == (
            "",
            {"ok": True},
        )

        store.process.send_signal(signal.SIGTERM)
        assert store.process.wait(120) == 0


def test_a_node_that_is_told_to_stop_before_any_worker_came_ends_well(redis_url: str, tmp_path: Path) -> None:
    with store_process(redis_url, tmp_path / "log", "--served-model-name", "other") as store:
        store.process.send_signal(signal.SIGTERM)
        assert store.process.wait(120) == 0


def test_a_port_that_is_taken_ends_the_process_with_a_line_that_names_it(redis_url: str, tmp_path: Path) -> None:
    with store_process(redis_url, tmp_path / "log", "--served-model-name", "other") as first:
        port = first.url.rsplit(":", 1)[1]
        command = [sys.executable, "-m", "services.store", "--redis", redis_url, "--http-port", port]
        second = subprocess.run(command, capture_output=True, text=True, timeout=150)
        assert second.returncode == 2
        assert "store node cannot start" in second.stderr
        assert port in second.stderr


# A disk that never answers, and no patience with it.
_HANGING = """
import os, sys, threading
os.fdatasync = lambda fd: threading.Event().wait()
import kvstore.store.tiered_store
kvstore.store.tiered_store._CLOSE_S = 0.1
from services.store.__main__ import main
sys.exit(main())
"""


async def test_a_disk_that_hangs_does_not_keep_the_process_from_ending(redis_url: str, tmp_path: Path) -> None:
    flags = ("--served-model-name", "m", "--store-disk-dir", str(tmp_path / "disk"), "--drain-timeout-s", "0.1")
    with store_process(redis_url, tmp_path / "log", *flags, program=("-c", _HANGING)) as store:
        registrar = Registrar(redis_url, WORKER)
        await registrar.start()
        await asyncio.to_thread(store.wait_for, lambda: store.get("/ready").status_code == 200, "it to be ready")
        await registrar.close()
        store.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(store.process.wait, 120) == 0
        assert "the disk hangs" in store.log
