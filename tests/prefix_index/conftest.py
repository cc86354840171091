"""Worlds around a shared Redis and around one that the test may hang or kill."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import redis

from services.cli.embedded_redis import EmbeddedRedis
from tests.prefix_index.index_world import World


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
async def world(redis_url: str) -> AsyncIterator[World]:
    world = World(redis_url)
    yield world
    await world.close()


@pytest.fixture
def own_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start() as server:
        yield server


@pytest.fixture
async def own_world(own_server: EmbeddedRedis) -> AsyncIterator[World]:
    world = World(own_server.url)
    yield world
    await world.close()
