"""The HTTP port of a worker or store node: probes and, unless told otherwise, metrics for all; the rest by a token."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
import pytest
from prometheus_client import CollectorRegistry

from services.node import DebugServer

TOKENS = ("a" * 64, "b" * 64)
OPEN, GUARDED = ("/health", "/ready"), ("/debug/state", "/debug/integrity", "/nowhere", "/docs", "/health/", "//health")


@asynccontextmanager
async def served(tokens: Sequence[str] = TOKENS, open_metrics: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    async def check() -> None: ...

    server = DebugServer(CollectorRegistry, dict, check, str, str, tokens=tokens, open_metrics=open_metrics)
    address = await server.start("127.0.0.1", 0)
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            yield client
    finally:
        await server.close()


async def statuses(client: httpx.AsyncClient, paths: Sequence[str], **headers: str) -> set[int]:
    return {(await client.get(path, headers=headers)).status_code for path in paths}


async def test_a_stranger_may_probe_and_scrape_and_nothing_else() -> None:
    async with served() as client:
        assert await statuses(client, [*OPEN, "/metrics"]) == {200}
        for method in ("GET", "POST", "HEAD", "OPTIONS"):
            for path in GUARDED:
                answer = await client.request(method, path)
                assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), (method, path)


@pytest.mark.parametrize(
    "given", ["", "Bearer", f"Bearer {'c' * 64}", "a" * 64, f"Basic {'a' * 64}", f"Bearer {'a' * 63}", "Bearer ä"]
)
async def test_what_is_no_token_opens_nothing(given: str) -> None:
    async with served() as client:
        for path in GUARDED:
            headers = [(b"Authorization", given.encode("latin-1"))]
            assert (await client.get(path, headers=headers)).status_code == 401
        twice = [(b"Authorization", f"Bearer {TOKENS[0]}".encode())] * 2
        assert (await client.get("/debug/state", headers=twice)).status_code == 401


@pytest.mark.parametrize("token", TOKENS)
async def test_a_token_of_either_secret_opens_the_rest(token: str) -> None:
    async with served() as client:
        assert await statuses(client, GUARDED[:2], Authorization=f"Bearer {token}") == {200}
        assert await statuses(client, ["/nowhere"], Authorization=f"Bearer {token}") == {404}


async def test_metrics_are_closed_where_that_is_wanted() -> None:
    async with served(open_metrics=False) as client:
        assert await statuses(client, ["/metrics"]) == {401}
        assert await statuses(client, OPEN) == {200}


async def test_without_a_secret_no_token_is_needed() -> None:
    async with served(tokens=()) as client:
        assert await statuses(client, [*OPEN, "/metrics", *GUARDED[:2]]) == {200}


async def test_a_worker_that_simulates_its_model_says_so_to_whoever_asks_for_its_health() -> None:
    async def check() -> None: ...

    server = DebugServer(CollectorRegistry, dict, check, str, str, lambda: "a simulation", tokens=TOKENS)
    address = await server.start("127.0.0.1", 0)
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}") as client:
            answer = await client.get("/health")
    finally:
        await server.close()
    assert (answer.status_code, answer.json()) == (200, {"status": "healthy", "note": "a simulation"})
