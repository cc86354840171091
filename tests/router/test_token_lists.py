"""A request's lists of tokens go to a worker once, and each of its sequences goes by them."""

from __future__ import annotations

import asyncio

import httpx
from tandem.v1 import worker_pb2 as pb

from services.orders import LISTS, RESUMES
from services.router.config import RouterConfig
from tests.router.fake_worker import Script, failing, permit
from tests.router.harness import running_router
from tests.waiting import until

URL = "/v1/completions"
ALLOWED, BIASES = list(range(5, 105)), dict.fromkeys(range(5, 55), 1.5)
BODY = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2, "allowed_token_ids": ALLOWED, "logit_bias": BIASES}


def client(running) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=running.base_url, timeout=60)


def goes_by_them(order: pb.GenerateRequest) -> bool:
    return (list(order.sampling.allowed_token_ids), dict(order.sampling.logit_bias)) == (ALLOWED, BIASES)


async def test_lists_reach_a_worker_once_and_are_forgotten_with_their_last_order(make_worker, sentence):
    permits = asyncio.Semaphore(0)
    worker = make_worker(lambda order: Script([sentence[:1], sentence[1:2]], permits=permits))
    worker.features = (RESUMES, LISTS)
    async with running_router(RouterConfig(), worker) as running, client(running) as http:
        for turn in (1, 2, 3):
            asked = asyncio.create_task(http.post(URL, json=BODY | {"n": 5}))
            await until(lambda turn=turn: len(worker.requests) == 5 * turn)
            assert (worker.num_lists_told, len(worker.lists)) == (turn, 1)
            if turn < 3:
                permit(permits, 10)
                assert (await asked).status_code == 200
            else:
                asked.cancel()
            await until(lambda: not worker.lists)
    assert all(map(goes_by_them, worker.requests))
    assert len({order.sampling.seed for order in worker.requests}) == 15


async def test_a_worker_that_knows_of_no_lists_has_them_in_each_order(make_worker):
    newer = make_worker(failing(pb.ERROR_CODE_UNAVAILABLE))
    newer.features = (RESUMES, LISTS)
    older = make_worker(load=pb.Load(num_running=5))  # so it is the second choice
    async with running_router(RouterConfig(), newer, older) as running, client(running) as http:
        assert (await http.post(URL, json=BODY | {"n": 3})).status_code == 200
        await until(lambda: not newer.lists)
    assert newer.requests
    assert len(older.requests) == 3
    assert all(map(goes_by_them, [*newer.requests, *older.requests]))
    assert older.num_lists_told == 0


async def test_a_request_of_one_sequence_has_them_in_its_order(make_worker):
    worker = make_worker()
    worker.features = (RESUMES, LISTS)
    async with running_router(RouterConfig(), worker) as running, client(running) as http:
        assert (await http.post(URL, json=BODY)).status_code == 200
    assert [(goes_by_them(order), order.token_lists) for order in worker.requests] == [(True, 0)]
    assert worker.num_lists_told == 0
