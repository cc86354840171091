"""A prompt without a token goes on elsewhere where it gains enough by that: not to and fro, nor when nearly done."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.v1 import worker_pb2 as pb

from services.budgets import Objectives
from services.orders import REDIRECTS, RESUMES
from services.router.config import RouterConfig
from services.router.routing import DecodeTable, Pending, PrefillTable, Redirect, redirects
from services.router.routing.redirecting import MAX_REDIRECTS, MIN_AGE_S, MIN_GAIN, MIN_GAIN_S
from tests.router.fake_worker import Script, permit
from tests.router.harness import running_router
from tests.router.test_bending import COST, DECODE, PREFILL, worker
from tests.waiting import until

PENDING = Pending(
    key="r",
    model="m",
    adapter="",
    model_fingerprint="f",
    decode_worker_id="d",
    at_worker_id="p",
    num_prompt_tokens=512,
    num_tokens=512,
    num_final_tokens=600,
    num_behind_tokens=0,
    age_s=0.5,
    num_redirects=0,
    objectives=Objectives(1.0, 0.08),
    is_deflected=False,
)


def look(*pending: Pending[str], **waiting: int) -> Redirect[str] | None:
    """`waiting`: tokens there; whose name begins with p computes prompts first."""
    pairs = []
    for name, number in waiting.items():
        bending = PREFILL if name.startswith("p") else DECODE
        pairs.append(worker(name, replace(bending, num_waiting_tokens=number), number))
    tables = DecodeTable([pair[0] for pair in pairs]), PrefillTable([pair[1] for pair in pairs])
    return redirects(pending or (PENDING,), *tables, COST)


# ---- the choice -------------------------------------------------------------------


def test_a_prompt_behind_a_long_queue_comes_to_its_idle_decode_worker():
    found = look(p=4000, d=0)
    assert found is not None
    assert (found.from_worker_id, found.to_worker_id, found.num_left_tokens) == ("p", "d", 512)
    assert found.gain_s >= found.least_gain_s


def test_it_goes_to_an_idle_prefill_worker_rather_than_beside_streams():
    busy = worker("d", DECODE, streams=20)
    others = [worker("p", replace(PREFILL, num_waiting_tokens=4000), 4000), worker("p2", PREFILL), busy]
    tables = DecodeTable([each[0] for each in others]), PrefillTable([each[1] for each in others])
    found = redirects((PENDING,), *tables, COST)
    assert found is not None
    assert found.to_worker_id == "p2"


def test_a_deflected_prompt_is_given_back_when_the_queue_has_emptied():
    deflected = replace(PENDING, at_worker_id="d", is_deflected=True, objectives=Objectives(9.0, 0.08))
    assert look(deflected, p=5000, d=700) is None
    found = look(deflected, p=0, d=1500)
    assert found is not None
    assert (found.from_worker_id, found.to_worker_id) == ("d", "p")


@pytest.mark.parametrize(
    "change",
    [
        {"num_redirects": MAX_REDIRECTS},
        {"age_s": MIN_AGE_S / 2},
        {"objectives": Objectives(60.0, 0.08)},  # in time where it is
        {"num_behind_tokens": 4000 - 100},  # nearly done
        {"at_worker_id": "gone"},
        {"decode_worker_id": "gone"},
    ],
)
def test_what_stays(change):
    assert look(p=4000, d=0) is not None
    assert look(replace(PENDING, **change), p=4000, d=0) is None


def test_one_at_a_time_and_the_one_that_gains_most():
    first, second = PENDING, replace(PENDING, key="later", num_behind_tokens=0)
    found = look(replace(first, num_behind_tokens=512), second, p=4000, d=0)
    assert found is not None
    assert found.key == "later"


@given(
    here=st.integers(0, 20_000),
    there=st.integers(0, 20_000),
    back=st.integers(0, 20_000),
    num_tokens=st.integers(1, 2000),
    left_s=st.floats(0, 30) | st.just(math.inf),
)
def test_nobody_moves_for_less_than_the_stated_gain_nor_to_and_fro(here, there, back, num_tokens, left_s):
    pending = replace(PENDING, num_prompt_tokens=num_tokens, num_tokens=num_tokens, objectives=Objectives(left_s, 0.08))
    found = look(pending, p=here, d=back, p2=there)
    if found is None:
        return
    assert found.gain_s >= max(MIN_GAIN_S, MIN_GAIN * found.here_s)
    # With the queues as they are then, it stays: the same tables never send it back.
    moved = {"p": here - found.num_left_tokens, "d": back, "p2": there}
    moved[found.to_worker_id] += found.num_left_tokens
    after = replace(pending, at_worker_id=found.to_worker_id, num_tokens=found.num_left_tokens, num_redirects=1)
    again = look(after, **moved)
    assert again is None or again.to_worker_id != found.from_worker_id


# ---- by a router --------------------------------------------------------------------


def load(role: str, num_waiting: int) -> pb.Load:
    budgets = pb.Budgets(role=role, tpot_s=0.08)
    return pb.Load(num_blocks=1000, num_free_blocks=1000, num_waiting_tokens=num_waiting, budgets=budgets)


async def test_a_router_redirects_once_it_hears_of_the_queue_and_moves_its_books(make_worker, sentence):
    permits = asyncio.Semaphore(0)
    usage = pb.Usage(num_prompt_tokens=90, prefilled_locally=True, num_redirects=1)
    script = Script([sentence[:1], sentence[1:2]], permits=permits, usage=usage)
    features = (RESUMES, REDIRECTS)
    first = make_worker(load=load("prefill", 0), features=features)
    second = make_worker(lambda request: script, load=load("decode", 0), features=features)
    config = RouterConfig(ttft_objective=200, worker_backlog_s=0)
    async with (
        running_router(config, first, second) as running,
        httpx.AsyncClient(base_url=running.base_url, timeout=60) as client,
    ):
        running.membership.set(first.record("elastic"), second.record("elastic"))
        workers, placer = running.parts.workers, running.parts.placer
        await until(lambda: [row.bending.role for row in workers.prefill_table().workers] == ["prefill", "decode"])
        body = {"prompt": list(range(5, 95)), "max_tokens": 2, "receipt": True}
        asking = asyncio.create_task(client.post("/v1/completions", json=body, headers={"x-request-id": "r"}))
        await until(lambda: second.requests)
        (target,) = second.requests[0].prefill_targets
        assert target.worker_id == first.worker_id
        waiting = {row.worker_id: row.num_outstanding_tokens for row in workers.prefill_table().workers}
        assert waiting == {first.worker_id: 90, second.worker_id: 0}

        def hears_of_others() -> bool:
            first.say(pb.SessionFrame(load=load("prefill", 20_000)))
            return bool(second.redirects)

        await until(hears_of_others)  # more than once: until it is old enough to go
        (redirect,) = second.redirects
        assert (redirect.handle, list(redirect.prefill_targets)) == (second.requests[0].handle, [])
        queued = {row.worker_id: row.num_waiting_tokens for row in workers.decode_table().workers}
        assert queued[second.worker_id] == 90
        permit(permits, 2)
        answer = await asking
        assert answer.status_code == 200
        queued = {row.worker_id: row.num_waiting_tokens for row in workers.decode_table().workers}
        assert queued[second.worker_id] == 0
        (receipt,) = answer.json()["receipt"]["sequences"]
        assert (receipt["redirects"], receipt["deflected"]) == (1, "prompt")
        (decided, moved) = [entry.to_json() for entry in placer.log.find("", answer.json()["receipt"]["request_id"])]
        assert decided["redirect"] is None
        assert moved["redirect"]["from"] == first.worker_id
        assert moved["redirect"]["to"] == moved["chosen"]["prefilled_by"] == second.worker_id
        metrics = running.parts.metrics.exposition().decode()
        assert 'tandem:router_redirects_total{direction="decode"} 1.0' in metrics
        assert not placer._redirects._waiting


async def test_a_policy_without_costs_redirects_nothing(make_worker, sentence):
    permits = asyncio.Semaphore(0)
    first = make_worker(load=load("prefill", 0), features=(RESUMES, REDIRECTS))
    script = Script([sentence[:1], sentence[1:2]], permits=permits)
    second = make_worker(lambda request: script, load=load("decode", 0), features=(RESUMES, REDIRECTS))
    config = RouterConfig(ttft_objective=200, worker_backlog_s=0, routing_policy="least-loaded")
    async with (
        running_router(config, first, second) as running,
        httpx.AsyncClient(base_url=running.base_url, timeout=60) as client,
    ):
        running.membership.set(first.record("elastic"), second.record("elastic"))
        workers, placer = running.parts.workers, running.parts.placer
        await until(lambda: [row.bending.role for row in workers.prefill_table().workers] == ["prefill", "decode"])
        asking = asyncio.create_task(
            client.post("/v1/completions", json={"prompt": list(range(5, 95)), "max_tokens": 2})
        )
        await until(lambda: second.requests)
        assert not placer._redirects._waiting
        permit(permits, 2)
        assert (await asking).status_code == 200
