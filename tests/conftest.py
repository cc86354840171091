"""What several areas share: a real Redis, of the version that --redis-server names, and how Hypothesis searches."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, settings

from services.cli import embedded_redis
from services.cli.embedded_redis import EmbeddedRedis

# No test depends on how fast the machine is, nor on what else runs on it.
settings.register_profile("tandem", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tandem")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--redis-server", type=Path, help="a redis-server or valkey-server binary to test with, instead of the packaged"
    )


def pytest_configure(config: pytest.Config) -> None:
    # What a shell starts in the background ignores SIGINT, and so would each process that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    binary = config.getoption("--redis-server")
    if binary is not None:
        embedded_redis.find_redis_server = lambda: binary


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where there is no vLLM, what needs it is not there either: `make test-vllm` has an environment for it."""
    with_vllm = [item for item in items if item.get_closest_marker("vllm") is not None]
    if importlib.util.find_spec("vllm") is None:
        config.hook.pytest_deselected(items=with_vllm)
        items[:] = [item for item in items if item.get_closest_marker("vllm") is None]
        return
    for item in with_vllm:  # what vLLM and torch warn each other of is no error of ours
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """One server for the whole run; tests that stop or hang their server start one of their own."""
    with EmbeddedRedis.start() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """The URL of an empty Redis."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url
