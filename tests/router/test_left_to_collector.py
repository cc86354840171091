"""What a request was made of goes with it: what collections had to find would hold up all streams, by the thousands."""

from __future__ import annotations

import gc

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from services.router.config import RouterConfig
from services.router.fleet import Dispatch
from services.router.openai.generation import Generation
from tests.router.harness import running_router, until

CHAT = {"messages": [{"role": "user", "content": "Hello world!"}], "max_tokens": 4}


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"stream": True, "n": 2}], ids=["whole", "stream", "choices"])
async def test_nothing_of_a_request_is_left_to_the_collector(make_worker, body):
    async with (
        running_router(RouterConfig(), make_worker()) as running,
        httpx.AsyncClient(base_url=running.base_url, timeout=60) as http,
    ):
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                assert (await http.post("/v1/chat/completions", json=CHAT | body)).status_code == 200
            # A connection keeps the last one's, until the next comes.
            await until(lambda: not count(Dispatch) and not count(Generation) and count(RequestResponseCycle) <= 1)
        finally:
            gc.enable()


def count(kind: type) -> int:
    return sum(type(each) is kind for each in gc.get_objects())
