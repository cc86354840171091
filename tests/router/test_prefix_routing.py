"""Routing by prefixes over HTTP: the index is asked once, its holders go into the order, and doing without it works."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from tandem.v1 import worker_pb2 as pb

from kvstore.block import hash_blocks, namespace
from kvstore.index import IndexReader, IndexWriter, Tier
from kvstore.index.entries import Holding, decode_holdings
from kvstore.registry import Registrar
from services.rates import GUESSED
from services.router.config import RouterConfig
from tests.router.fake_worker import FakeWorker, Script, endless, failing, permit
from tests.router.harness import FakeIndex, running_router, until
from tests.worker_records import worker_record

FINGERPRINT = worker_record().model_fingerprint
PROMPT = [token % 250 for token in range(193)]  # six full blocks of 32 and one token
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2}


def client(running) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=running.base_url, timeout=60)


def prefill_records(sentence, names="ab"):
    return tuple(FakeWorker(endless(sentence), worker_id=f"prefill-{name}").record("prefill") for name in names)


def holding(record, *num_per_tier: int) -> Holding:
    return Holding(record.worker_id, record.incarnation, sum(num_per_tier), num_per_tier)


def sample(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


async def test_identical_cold_prompts_at_once_all_name_one_prefill_worker(make_worker, sentence):
    permits = asyncio.Semaphore(0)
    decodes = [make_worker(lambda request: Script([sentence[:2]], permits=permits)) for _ in range(2)]
    records = prefill_records(sentence)
    async with running_router(RouterConfig(), *decodes, extra_records=records) as running, client(running) as http:
        asking = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(32)]
        await until(lambda: sum(len(worker.requests) for worker in decodes) == 32)
        permit(permits, 32)
        await asyncio.gather(*asking)
        orders = [order for worker in decodes for order in worker.requests]
        assert len({order.prefill_targets[0].worker_id for order in orders}) == 1
        assert all(worker.num_outstanding_tokens == 0 for worker in running.parts.workers.prefill_candidates())
        assert [len(worker.requests) for worker in decodes] == [16, 16]


async def test_the_next_turn_finds_its_decode_worker_before_the_index_has_caught_up(make_worker, sentence):
    decodes = [make_worker() for _ in range(4)]
    records = prefill_records(sentence)
    async with running_router(RouterConfig(), *decodes, extra_records=records) as running, client(running) as http:
        await http.post("/v1/completions", json=BODY)
        (first,) = [worker for worker in decodes if worker.requests]
        await http.post("/v1/completions", json={**BODY, "prompt": [*PROMPT, 7, 8, 9]})
        assert len(first.requests) == 2


async def test_the_index_is_asked_for_the_prompt_s_blocks_and_its_holders_are_in_the_order(make_worker, sentence):
    decode = make_worker()
    near, far, other = prefill_records(sentence, "abc")
    index = FakeIndex(
        lambda hashes: [
            holding(far, 2, 0, 3, 0),
            holding(near, 6, 0, 0, 0),
            Holding("prefill-c", "another incarnation", 6, (6, 0, 0, 0)),
            Holding("unknown", "1", 6, (6, 0, 0, 0)),
        ]
    )
    records = (near, far, other)
    async with (
        running_router(RouterConfig(), decode, extra_records=records, index=index) as running,
        client(running) as http,
    ):
        await http.post("/v1/completions", json={**BODY, "cache_salt": "s"})
        metrics = (await http.get("/metrics")).text
    assert index.asked == [hash_blocks(namespace(FINGERPRINT, "s"), PROMPT, 32)]
    (order,) = decode.requests
    assert order.prefill_targets[0].worker_id == "prefill-a"
    assert list(order.prefix_sources) == [
        pb.PrefixSource(
            holder_id="prefill-b", incarnation=far.incarnation, kv_address=far.kv_address, num_blocks=5, tier="store"
        )
    ]
    assert sample(metrics, 'tandem:router_index_lookups_total{outcome="found"}') == 1
    assert sample(metrics, "tandem:router_index_up") == 1


async def test_at_most_four_sources_go_into_an_order_the_longest_first(make_worker, sentence):
    decode = make_worker()
    holders = prefill_records(sentence, "abcdef")
    index = FakeIndex(lambda hashes: [holding(record, number + 1, 0, 0, 0) for number, record in enumerate(holders)])
    async with (
        running_router(RouterConfig(), decode, extra_records=holders, index=index) as running,
        client(running) as http,
    ):
        await http.post("/v1/completions", json=BODY)
    (order,) = decode.requests
    assert order.prefill_targets[0].worker_id == "prefill-f"
    assert [source.num_blocks for source in order.prefix_sources] == [5, 4, 3, 2]


@pytest.mark.parametrize(
    "index",
    [
        None,
        FakeIndex(available=False),
        FakeIndex(hangs=True),
        FakeIndex(lambda hashes: decode_holdings([(1, b"x")], {})),
    ],
    ids=["no index", "away", "hangs", "nonsense"],
)
async def test_without_an_answer_of_the_index_requests_go_on(make_worker, index):
    decode = make_worker()
    async with running_router(RouterConfig(), decode, index=index) as running, client(running) as http:
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        metrics = (await http.get("/metrics")).text
    assert sample(metrics, 'tandem:router_index_lookups_total{outcome="no_answer"}') == (index is not None)
    assert list(decode.requests[0].prefix_sources) == []


async def test_prompts_without_a_full_block_and_those_to_be_computed_afresh_are_not_asked_for(make_worker):
    decode, index = make_worker(), FakeIndex()
    async with running_router(RouterConfig(), decode, index=index) as running, client(running) as http:
        await http.post("/v1/completions", json={**BODY, "prompt": PROMPT[:31]})
        await http.post("/v1/completions", json={**BODY, "prompt_logprobs": 0})
        assert index.asked == []
        await http.post("/v1/completions", json={**BODY, "prompt": [PROMPT, PROMPT[:40]], "n": 2})
        assert [len(hashes) for hashes in index.asked] == [6, 1]


@pytest.mark.parametrize("policy", ["kv", "least-loaded", "round-robin", "prefix-hash"])
async def test_every_policy_serves(make_worker, sentence, policy):
    decodes, records = [make_worker() for _ in range(2)], prefill_records(sentence)
    config = RouterConfig(routing_policy=policy)
    async with running_router(config, *decodes, extra_records=records) as running, client(running) as http:
        for number in range(4):
            headers = {"X-Request-Id": f"r{number}"}
            assert (await http.post("/v1/completions", json=BODY, headers=headers)).status_code == 200
        (decision,) = (await http.get("/debug/routing/r3")).json()["decisions"]
        assert decision["policy"] == policy
        if policy == "round-robin":
            assert [len(worker.requests) for worker in decodes] == [2, 2]


async def test_the_memory_of_what_was_sent_follows_who_really_prefilled(make_worker, sentence):
    decode, records = make_worker(), prefill_records(sentence)

    async def expected_after(http, usage: pb.Usage) -> dict[str, int]:
        decode.reply = lambda request: Script([sentence[:2]], usage=usage)
        prompt = [usage.num_recomputes, *PROMPT[1:]]  # another one each time
        for request_id in ("first", "second"):
            body = {**BODY, "prompt": prompt, "request_id": f"{request_id}-{usage.num_recomputes}"}
            await http.post("/v1/completions", json=body)
        answer = await http.get(f"/debug/routing/second-{usage.num_recomputes}")
        return answer.json()["decisions"][0]["expected_blocks"]

    async with running_router(RouterConfig(), decode, extra_records=records) as running, client(running) as http:
        local = pb.Usage(num_recomputes=1, prefilled_locally=True)
        assert await expected_after(http, local) == {decode.worker_id: 6}
        for name in ("prefill-a", "prefill-b"):
            handed_over = pb.Usage(num_recomputes=2, prefill_worker_id=name, num_transferred_blocks=7)
            expected = await expected_after(http, handed_over)
            assert expected.pop(decode.worker_id) == 6
            assert set(expected) <= {name}  # not the other one, if that was expected to
        at_once = pb.Usage(num_recomputes=3, prefill_worker_id="prefill-a")  # its first token was its last
        assert decode.worker_id not in await expected_after(http, at_once)


async def rates_of(http, request_id: str) -> dict[str, float]:
    await http.post("/v1/completions", json={**BODY, "request_id": request_id})
    return (await http.get(f"/debug/routing/{request_id}")).json()["decisions"][0]["rates"]


async def test_the_router_reckons_with_the_rates_in_its_decode_workers_load(make_worker):
    rates = pb.Rates(prompt_token_s=0.5, num_steps=20)
    decodes = [make_worker(load=pb.Load(rates=rates)), make_worker(load=pb.Load())]
    async with running_router(RouterConfig(), *decodes) as running, client(running) as http:
        told = await rates_of(http, "r")
    assert (told["prompt_token_s"], told["base_s"], told["num_steps"]) == (0.5, GUESSED.base_s, 20)


async def test_the_router_reckons_with_what_prefill_workers_say_with_their_answers(make_worker, sentence):
    said = pb.Rates(prompt_token_s=0.5, num_steps=20)
    usage = pb.Usage(prefill_worker_id="prefill-a", num_transferred_blocks=7, prefill_rates=said)
    decode = make_worker(lambda request: Script([[300], [301]], usage=usage), load=pb.Load(rates=pb.Rates(num_steps=9)))
    records = prefill_records(sentence)
    async with running_router(RouterConfig(), decode, extra_records=records) as running, client(running) as http:
        first, second = await rates_of(http, "first"), await rates_of(http, "second")
    assert (first["prompt_token_s"], first["num_steps"]) == (GUESSED.prompt_token_s, 0)
    assert (second["prompt_token_s"], second["num_steps"]) == (0.5, 20)


async def test_with_the_real_index(make_worker, sentence, redis_url):
    decode, (holder, other) = make_worker(), prefill_records(sentence)
    hashes = hash_blocks(namespace(FINGERPRINT), PROMPT, 32)
    blocks = [*((block_hash, Tier.DEVICE) for block_hash in hashes[:3]), (hashes[3], Tier.HOST)]
    writer = IndexWriter(redis_url, holder.worker_id, holder.incarnation, lambda: blocks)
    registrar = Registrar(redis_url, holder)
    index = IndexReader(redis_url, timeout_s=10.0)
    config = RouterConfig(index_timeout_s=5.0)
    await registrar.start()
    await writer.start()
    await index.start()
    try:
        await until(lambda: writer.synced, 10)
        async with (
            running_router(config, decode, extra_records=(other, holder), index=index) as running,
            client(running) as http,
        ):
            await until(lambda: index.available, 10)
            await http.post("/v1/completions", json={**BODY, "request_id": "r"})
            (decision,) = (await http.get("/debug/routing/r")).json()["decisions"]
    finally:
        await index.close()
        await writer.close()
        await registrar.close()
    assert decision["index"]["holders"] == {holder.worker_id: {"blocks": 4, "per_tier": [3, 1, 0, 0]}}
    assert decision["chosen"]["prefill"] == [holder.worker_id, other.worker_id]


# ---- explanations -------------------------------------------------------------------


async def test_a_decision_is_explained_without_the_prompt(make_worker, sentence):
    decode, records = make_worker(), prefill_records(sentence)
    index = FakeIndex(lambda hashes: [holding(records[0], 4, 0, 0, 0)])
    async with (
        running_router(RouterConfig(), decode, extra_records=records, index=index) as running,
        client(running) as http,
    ):
        await http.post("/v1/completions", json={**BODY, "request_id": "why", "cache_salt": "secret-salt"})
        response = await http.get("/debug/routing/why")
        assert (await http.get("/debug/routing/other")).status_code == 404
    answer = response.json()
    (decision,) = answer["decisions"]
    assert answer["request_id"] == "why"
    assert (decision["sequence"], decision["attempt"], decision["retried_after"]) == (0, 1, None)
    assert (decision["prompt_tokens"], decision["prompt_blocks"]) == (193, 6)
    assert decision["index"]["asked"]
    assert decision["index"]["seconds"] >= 0
    assert decision["index"]["holders"] == {"prefill-a": {"blocks": 4, "per_tier": [4, 0, 0, 0]}}
    assert decision["chosen"]["decode"] == decode.worker_id
    assert decision["chosen"]["prefilled_by"] == decision["chosen"]["prefill"][0] == "prefill-a"
    terms = decision["candidates"]["prefill"]
    assert [member["worker_id"] for member in terms] == ["prefill-a", "prefill-b"]
    assert terms[0]["total"] < terms[1]["total"]
    assert terms[1]["fetched_from"] == "prefill-a"
    assert {"prefill", "running", "kv_use", "total"} <= set(decision["candidates"]["decode"][0])
    for secret in ("secret-salt", "token_ids", hash_blocks(namespace(FINGERPRINT), PROMPT, 32)[0].hex()):
        assert secret not in response.text


async def test_the_workers_that_the_router_can_use_are_listed(make_worker, sentence):
    decode, records = make_worker(), prefill_records(sentence)[:1]
    async with running_router(RouterConfig(), decode, extra_records=records) as running, client(running) as http:
        workers = (await http.get("/debug/workers")).json()["workers"]
    assert {worker["worker_id"]: (worker["role"], worker["connected"], worker["draining"]) for worker in workers} == {
        decode.worker_id: ("decode", True, False),
        "prefill-a": ("prefill", True, False),
    }


async def test_retries_and_refusals_are_explained_too(make_worker):
    busy, free = make_worker(failing(pb.ERROR_CODE_OVERLOADED)), make_worker(load=pb.Load(num_running=5))
    config = RouterConfig(reconnect_max_s=0.2)
    async with running_router(config, busy, free) as running, client(running) as http:
        await http.post("/v1/completions", json={**BODY, "request_id": "retried"})
        first, second = (await http.get("/debug/routing/retried")).json()["decisions"]
        assert (first["chosen"]["decode"], second["chosen"]["decode"]) == (busy.worker_id, free.worker_id)
        assert (second["attempt"], second["retried_after"]) == (2, "ERROR_CODE_OVERLOADED")
        await busy.stop()
        await free.stop()
        await until(lambda: running.parts.workers.num_sessions_up == 0)
        assert (await http.post("/v1/completions", json={**BODY, "request_id": "refused"})).status_code == 503
        (refused,) = (await http.get("/debug/routing/refused")).json()["decisions"]
        assert refused["refused"] == "not_connected"


async def test_the_history_is_bounded(make_worker):
    async with running_router(RouterConfig(routing_history=3), make_worker()) as running, client(running) as http:
        for number in range(4):
            await http.post("/v1/completions", json={**BODY, "request_id": f"r{number}"})
        found = [(await http.get(f"/debug/routing/r{number}")).status_code for number in range(4)]
    assert found == [404, 200, 200, 200]
