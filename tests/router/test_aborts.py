"""POST /abort_requests: ends a tenant's requests by their ids."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from services.router.edge.stopping import Stopping
from services.router.errors import ApiError


async def test_a_tenant_ends_its_own_requests_alone():
    stopping, never = Stopping(), asyncio.Event()

    async def run(tenant: str, request_id: str) -> None:
        async with stopping.deadline(None, None, (tenant, request_id)):
            await never.wait()

    tasks = {name: asyncio.create_task(run(*name.split("/"))) for name in ("acme/a", "acme/b", "school/a")}
    await asyncio.sleep(0)
    assert stopping.abort("acme", ["a", "nobodys"]) == ["a"]
    with pytest.raises(ApiError) as caught:
        await tasks["acme/a"]
    assert (caught.value.status, caught.value.code) == (499, "aborted")
    assert stopping.abort("acme", ["a"]) == []
    assert not tasks["acme/b"].done()
    assert not tasks["school/a"].done()
    assert stopping.end() == 2
    for task in (tasks["acme/b"], tasks["school/a"]):
        with pytest.raises(ApiError) as caught:
            await task
        assert caught.value.code == "router_stopping"


def test_ids_that_nobody_has_are_not_among_the_aborted(router):
    answer = httpx.post(f"{router.base_url}/abort_requests", json={"request_ids": ["nobodys"]}, timeout=60)
    assert answer.json() == {"aborted": []}


@pytest.mark.parametrize("body", [{}, {"request_ids": []}, {"request_ids": "a"}, {"request_ids": [1]}])
def test_a_body_without_ids_is_refused(router, body):
    answer = httpx.post(f"{router.base_url}/abort_requests", json=body, timeout=60)
    assert answer.status_code == 400
    assert "request_ids" in answer.json()["error"]["message"]
