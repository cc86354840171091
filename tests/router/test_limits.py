"""What one client may take: sequences per request, bytes of orders, places in queues; and what the others see of it."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from tandem.v1 import worker_pb2 as pb

from services.router.config import RouterConfig
from services.router.errors import ClientDisconnected
from services.router.fleet import session as session_module
from services.router.fleet.session import SessionFull, WorkerSession
from services.router.fleet.silence import Silence
from services.router.sse import cancelled_on_disconnect
from tests.memory_orders import MemoryOrders
from tests.router.fake_worker import Script, permit
from tests.router.harness import running_router, until

BODY = {"model": "tiny", "prompt": "x", "max_tokens": 1}
URL = "/v1/completions"


def client(running) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=running.base_url, timeout=60)


def gauge(metrics: str, name: str) -> float:
    (line,) = [line for line in metrics.splitlines() if line.startswith(f"{name}{{")]
    return float(line.rpartition(" ")[2])


@pytest.mark.parametrize(("prompts", "n", "param"), [(1, 9, "n"), (3, 3, "n"), (9, 1, "prompt")])
async def test_prompts_times_n_are_bounded(make_worker, prompts, n, param):
    worker = make_worker()
    async with running_router(RouterConfig(max_sequences_per_request=8), worker) as running, client(running) as http:
        refused = await http.post(URL, json={**BODY, "prompt": ["x"] * prompts, "n": n})
        assert (await http.post(URL, json={**BODY, "prompt": ["x"] * 4, "n": 2})).status_code == 200
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "8 at most" in error["message"]
    assert len(worker.requests) == 8


async def test_submitting_many_sequences_freezes_nobody(make_worker, monkeypatch):
    async with running_router(RouterConfig(), make_worker()) as running, client(running) as http:
        turns, at = 0, []
        place = running.parts.placer.place

        def watched(*args, **kwargs):
            at.append(turns)
            return place(*args, **kwargs)

        monkeypatch.setattr(running.parts.placer, "place", watched)
        asking = asyncio.create_task(http.post(URL, json={**BODY, "prompt": ["x", "y"], "n": 50}))
        while not asking.done():
            turns += 1
            await asyncio.sleep(0)
        assert (await asking).status_code == 200
    assert len(at) == len(set(at)) == 100


async def test_a_request_of_many_sequences_holds_no_small_one_up(make_worker, sentence):
    permits = asyncio.Semaphore(0)
    worker = make_worker(lambda request: Script([sentence[:1]], permits=permits))
    config = RouterConfig(max_concurrent_requests=2)
    async with running_router(config, worker) as running, client(running) as http:
        first = [asyncio.create_task(http.post(URL, json=BODY)) for _ in range(2)]
        await until(lambda: len(worker.requests) == 2)
        big = asyncio.create_task(http.post(URL, json={**BODY, "prompt": ["big"] * 20, "request_id": "big"}))
        await until(lambda: running.parts.admission.num_waiting == 20)
        small = asyncio.create_task(http.post(URL, json={**BODY, "request_id": "small"}))
        await until(lambda: running.parts.admission.num_waiting == 21)
        permit(permits, 2)
        await asyncio.gather(*first)
        await until(lambda: len(worker.requests) == 4)
        assert sorted(request.request_id for request in worker.requests[2:]) == ["big-0", "small"]
        permit(permits, 21)
        assert [answer.status_code for answer in await asyncio.gather(big, small)] == [200, 200]
        assert len((await big).json()["choices"]) == 20
        assert running.parts.admission.num_running == 0


async def test_who_waits_in_the_router_is_seen_by_scalers(make_worker, sentence):
    permits = asyncio.Semaphore(0)
    worker = make_worker(lambda request: Script([sentence[:1]], permits=permits))
    async with (
        running_router(RouterConfig(max_concurrent_requests=1), worker) as running,
        client(running) as http,
    ):
        asking = [asyncio.create_task(http.post(URL, json=BODY)) for _ in range(3)]
        await until(lambda: worker.requests and running.parts.admission.num_waiting == 2)
        metrics = (await http.get("/metrics")).text
        assert gauge(metrics, "vllm:num_requests_waiting") == 3
        asking.pop().cancel()
        await until(lambda: running.parts.admission.num_waiting == 1)
        permit(permits, 2)
        await asyncio.gather(*asking)
        metrics = (await http.get("/metrics")).text
    assert gauge(metrics, "vllm:num_requests_waiting") == gauge(metrics, "vllm:num_requests_running") == 0
    assert len(worker.requests) == 2


async def test_token_id_prompts_do_not_wait_for_the_tokenizer(make_worker):
    config = RouterConfig(tokenizer_pool_size=1, tokenizer_queue=1)
    async with running_router(config, make_worker()) as running, client(running) as http:
        asking = [http.post(URL, json={**BODY, "prompt": list(range(5, 70))}) for _ in range(30)]
        assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}


async def test_orders_that_a_worker_does_not_read_are_bounded(make_worker, monkeypatch):
    monkeypatch.setattr(session_module, "MAX_OUTBOX_BYTES", 10_000)
    session = WorkerSession(make_worker().record(), "router", MemoryOrders(), 1.0, Silence(2.0))
    session.connected = True  # and nobody takes its orders

    def submit():
        order = pb.GenerateRequest(prompt_token_ids=[100_000] * 1000)
        session.submit(pb.SessionRequest(generate=order), sink=None, lists=None)

    for _ in range(4):
        submit()
    with pytest.raises(SessionFull, match="bytes of orders wait"):
        submit()
    assert session.num_live == 4


async def test_when_no_worker_reads_its_orders_the_client_hears_429(make_worker, monkeypatch):
    monkeypatch.setattr(session_module, "MAX_OUTBOX_BYTES", 0)
    async with running_router(RouterConfig(), make_worker(), make_worker()) as running, client(running) as http:
        refused = await http.post(URL, json=BODY)
        assert refused.status_code == 429
        assert 'tandem:router_refusals_total{reason="workers_full"} 1.0' in (await http.get("/metrics")).text
        assert running.parts.admission.num_running == 0


async def test_a_priority_counts_only_where_the_operator_chose_so(make_worker):
    worker = make_worker()
    async with running_router(RouterConfig(), worker) as running, client(running) as http:
        refused = await http.post(URL, json={**BODY, "priority": -5})
        assert (await http.post(URL, json={**BODY, "priority": 0})).status_code == 200
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    config = RouterConfig(scheduling_policy="priority")
    chosen = make_worker()
    async with running_router(config, chosen) as running, client(running) as http:
        assert (await http.post(URL, json={**BODY, "priority": -5})).status_code == 200
    assert [request.priority for request in (*worker.requests, *chosen.requests)] == [0, -5]


@pytest.mark.parametrize(
    ("url", "fields", "param"),
    [
        (URL, {"prompt": "x", "max_tokens": 300}, "max_tokens"),
        (URL, {"prompt": [5] * 300}, "prompt"),
        (URL, {"prompt": [5] * 300, "max_tokens": 1}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 300}, "max_tokens"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 300},
            "max_completion_tokens",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 400}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 1}, "messages"),
    ],
)
def test_what_does_not_fit_the_context_is_called_as_the_client_wrote_it(router, url, fields, param):
    error = httpx.post(router.base_url + url, json=fields, timeout=60).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


@pytest.mark.parametrize("url", ["/tokenize", "/detokenize"])
async def test_a_tokenizer_that_hangs_holds_nobody_for_ever(make_worker, monkeypatch, url):
    async with running_router(RouterConfig(request_timeout_s=0.1), make_worker()) as running, client(running) as http:

        async def hangs(*work):
            await asyncio.Event().wait()

        monkeypatch.setattr(running.parts.pool, "run", hangs)
        answer = await http.post(url, json={"prompt": "x", "tokens": [5]})
    assert answer.status_code == 504
    assert "0.1 s" in answer.json()["error"]["message"]


async def test_a_watch_for_disconnects_that_fails_ends_the_request(caplog):
    async def receive():
        raise RuntimeError("the server is broken")

    with pytest.raises(ClientDisconnected):
        async with cancelled_on_disconnect(receive):
            await asyncio.Event().wait()
    assert "the watch for a disconnect failed" in caplog.text


async def test_a_stream_that_nobody_reads_is_cut_and_its_sequences_end_at_their_worker(make_worker, sentence):
    worker = make_worker(max_model_len=100_000)
    async with (
        running_router(RouterConfig(unread_timeout_s=0.2), worker) as running,
        client(running) as http,
    ):
        url = httpx.URL(running.base_url)
        body = json.dumps({**BODY, "max_tokens": 20_000, "stream": True, "n": 2}).encode()
        _, writer = await asyncio.open_connection(url.host, url.port, limit=1)
        writer.transport.pause_reading()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await worker.wait_for_abort(2)
        await until(lambda: running.parts.admission.num_running == 0)
        writer.transport.abort()
        metrics = (await http.get("/metrics")).text
    assert 'tandem:router_cut_connections_total{reason="unread"} 1.0' in metrics
    assert "tandem:router_client_disconnects_total 1.0" in metrics
