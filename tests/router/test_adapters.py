"""LoRA adapters over HTTP: listed and asked for as models, computed by workers that have those very files."""

from __future__ import annotations

import httpx

from kvstore.block import hash_blocks, namespace
from services.router.config import RouterConfig
from tests.router.fake_worker import FakeWorker, endless
from tests.router.harness import FakeIndex, running_router
from tests.worker_records import worker_record

FINGERPRINT = worker_record().model_fingerprint
PROMPT = [token % 250 for token in range(97)]  # three full blocks of 32 and one token


def client(running) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=running.base_url, timeout=60)


def body(model: str) -> dict[str, object]:
    return {"model": model, "prompt": PROMPT, "max_tokens": 2}


def prefill_record(sentence, worker_id: str, *adapters: str):
    return FakeWorker(endless(sentence), worker_id=worker_id, adapters=adapters).record("prefill")


async def test_an_adapter_is_listed_with_its_parent_and_an_unknown_one_is_not_found(make_worker):
    async with running_router(RouterConfig(), make_worker(adapters=("sql:00ff",))) as running, client(running) as http:
        models = {each["id"]: each for each in (await http.get("/v1/models")).json()["data"]}
        unknown = await http.post("/v1/completions", json=body("prose"))
        unnamed = await http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2})
    assert set(models) == {"tiny", "sql"}
    assert (models["tiny"]["parent"], models["sql"]["parent"], models["sql"]["root"]) == (None, "tiny", "sql:00ff")
    assert {(*each["engines"], *each["numerics"], each["is_exact"]) for each in models.values()} == {
        ("native", "paper/float32", False)
    }
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert unnamed.json()["model"] == "tiny"


async def test_an_order_names_the_adapter_and_its_blocks_and_goes_to_workers_that_have_it(make_worker, sentence):
    without, with_it = make_worker(), make_worker(adapters=("sql:00ff", "prose:11"))
    records = (prefill_record(sentence, "p-base"), prefill_record(sentence, "p-sql", "sql:00ff"))
    index = FakeIndex()
    async with (
        running_router(RouterConfig(), without, with_it, extra_records=records, index=index) as running,
        client(running) as http,
    ):
        for _ in range(4):
            answer = await http.post("/v1/completions", json=body("sql"))
            assert (answer.status_code, answer.json()["model"]) == (200, "sql")
        await http.post("/v1/completions", json=body("prose"))
    assert not without.requests
    *of_sql, of_prose = with_it.requests
    for order in of_sql:
        assert (order.model, order.adapter) == ("sql", "sql:00ff")
        assert [target.worker_id for target in order.prefill_targets] == ["p-sql"]
        assert order.prompt_hashes.root == namespace(FINGERPRINT, "", "sql:00ff")
    assert (of_prose.adapter, list(of_prose.prefill_targets)) == ("prose:11", [])  # nobody else has it
    keys = ["sql:00ff"] * 4 + ["prose:11"]
    assert index.asked == [hash_blocks(namespace(FINGERPRINT, "", key), PROMPT, 32) for key in keys]


async def test_of_two_files_under_one_name_those_of_most_workers_are_asked_for(make_worker, sentence):
    odd, *usual = (
        make_worker(adapters=("sql:11",)),
        make_worker(adapters=("sql:22",)),
        make_worker(adapters=("sql:22",)),
    )
    records = (prefill_record(sentence, "p-odd", "sql:11"), prefill_record(sentence, "p-usual", "sql:22"))
    async with (
        running_router(RouterConfig(), odd, *usual, extra_records=records) as running,
        client(running) as http,
    ):
        for _ in range(6):
            assert (await http.post("/v1/completions", json=body("sql"))).status_code == 200
    orders = [order for worker in usual for order in worker.requests]
    assert (len(orders), len(odd.requests)) == (6, 0)
    assert {target.worker_id for order in orders for target in order.prefill_targets} == {"p-usual"}


async def test_a_router_of_some_names_serves_those_alone(make_worker):
    config, worker = RouterConfig(served_model_name=("tiny",)), make_worker(adapters=("sql:00ff",))
    async with running_router(config, worker) as running, client(running) as http:
        assert [each["id"] for each in (await http.get("/v1/models")).json()["data"]] == ["tiny"]
        assert (await http.post("/v1/completions", json=body("sql"))).status_code == 404
