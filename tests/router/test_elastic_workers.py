"""An elastic worker stands among prefill and decode workers, by what its frames say of it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tandem.v1 import worker_pb2 as pb

from services.budgets import UNBOUND, UNLIMITED, Budgets
from services.rates import Rates
from services.router.admission import Applicant
from services.router.config import RouterConfig
from services.router.fleet import Headroom, WorkerSession
from services.router.fleet.known_rates import ModelRates
from services.router.fleet.worker_load import budgets_from_proto, role_from_proto
from services.router.routing import FIXED, NO_OBJECTIVES, Bending, Decision, DecodeTable, Policy, PrefillTable, choose
from services.router.views import WORKERS
from tests.router.scripted_fleet import ScriptedWorker, scripted_fleet
from tests.router.test_candidate_tables import make_decode, make_elastic, make_prefill, make_request
from tests.router.test_headroom import StillWorkers, decode, prefill
from tests.waiting import until


def elastic(model_directory, role: str, **facts: object) -> ScriptedWorker:
    budgets = pb.Budgets(role=role, tpot_s=0.08 if role == "prefill" else 0.064)
    if role == "decode":
        budgets.prompt_tokens = 128
    return ScriptedWorker(str(model_directory), role="elastic", budgets=budgets, **facts)  # type: ignore[arg-type]


# ---- its rows -------------------------------------------------------------------


async def test_it_is_a_row_of_both_tables_with_what_it_last_said(model_directory):
    async with scripted_fleet() as fleet:
        worker = elastic(model_directory, "decode", num_running=3, num_context_tokens=900, num_waiting_tokens=700)
        await fleet.serve_with(worker)
        workers = fleet.parts.workers
        (prefill_row,), (decode_row,) = workers.prefill_table().workers, workers.decode_table().workers
        assert prefill_row.worker_id == decode_row.worker_id == worker.record.worker_id
        assert prefill_row.bending == decode_row.bending == Bending("decode", 0.064, 128, 3, 900, 700)
        assert prefill_row.num_outstanding_tokens == decode_row.num_waiting_tokens == 700
        # Its own count and the worker's word may be of the same prompts.
        workers.count_prefill(worker.record.key, 1000)
        assert workers.prefill_table().workers[0].num_outstanding_tokens == 1000
        assert workers.decode_table().workers[0].num_waiting_tokens == 1000
        workers.count_prefill(worker.record.key, -1000)
        assert workers.prefill_table().workers[0].num_outstanding_tokens == 700
        assert not workers.awaits_prefill(decode_row)
        (shown,) = WORKERS.of_one(fleet.parts)
        assert (shown["role"], shown["role_now"], shown["connected"]) == ("elastic", "decode", True)


async def test_nobody_gives_prompts_to_one_whose_session_is_down_or_that_drains(model_directory):
    async with scripted_fleet() as fleet:
        dead, drains = (
            elastic(model_directory, "prefill", is_dead=True),
            elastic(model_directory, "prefill", drains=True),
        )
        fleet.announce(dead, drains)
        fine = elastic(model_directory, "prefill")
        fleet.announce(dead, drains, fine)
        await until(lambda: fleet.parts.workers.num_sessions_up == 2)
        rows = {row.worker_id: row.draining for row in fleet.parts.workers.prefill_table().workers}
        assert rows == {dead.record.worker_id: True, drains.record.worker_id: True, fine.record.worker_id: False}


async def test_nobody_gives_prompts_to_one_that_should_have_said_something(model_directory, monkeypatch):
    async with scripted_fleet() as fleet:
        silent, fine = elastic(model_directory, "prefill"), elastic(model_directory, "decode")
        await fleet.serve_with(silent, fine)
        key = silent.record.key
        monkeypatch.setattr(WorkerSession, "is_suspect", property(lambda session: session.record.key == key))
        fleet.parts.workers.count_prefill(key, 1)
        rows = {row.worker_id: row.draining for row in fleet.parts.workers.prefill_table().workers}
        assert rows == {silent.record.worker_id: True, fine.record.worker_id: False}


@pytest.mark.parametrize(("policy", "num_tokens"), [("kv", 0), ("least-loaded", 9000), ("round-robin", 9000)])
async def test_prompts_wait_for_those_to_whom_the_policy_gives_them(model_directory, policy: str, num_tokens: int):
    config = RouterConfig(routing_policy=policy, ttft_objective=1000.0)
    async with scripted_fleet(config) as fleet:
        busy = elastic(model_directory, "prefill", num_waiting_tokens=9000)
        await fleet.serve_with(busy, elastic(model_directory, "decode"))
        (name,) = busy.record.served_model_names
        expected_s = fleet.parts.workers.rates(busy.record.model_fingerprint).prompt_s(num_tokens)
        assert fleet.parts.admission.estimate(Applicant(name)).worker_s == pytest.approx(expected_s)


async def test_a_lone_worker_of_either_role_serves(model_directory):
    for role in ("prefill", "decode"):
        async with scripted_fleet() as fleet:
            worker = elastic(model_directory, role)
            await fleet.serve_with(worker)
            answer = await fleet.ask(prompt="a b c", max_tokens=3, receipt=True)
            assert answer.error is None
            assert [list(order.prefill_targets) for order in worker.orders] == [[]]


async def test_without_objectives_each_does_the_work_of_its_role(model_directory):
    async with scripted_fleet() as fleet:
        first, second = elastic(model_directory, "prefill"), elastic(model_directory, "decode")
        await fleet.serve_with(first, second)
        await fleet.ask(prompt="a b c", max_tokens=3)
    assert not first.orders
    ((target,),) = [order.prefill_targets for order in second.orders]
    assert (target.worker_id, target.grpc_address) == (first.record.worker_id, first.record.grpc_address)


@pytest.mark.parametrize("policy", list(Policy))
def test_without_objectives_a_choice_is_that_among_workers_with_these_roles_fixed(policy):
    rng, num_decisions = random.Random(f"roles {policy}"), 0
    for _ in range(60):
        pairs = [make_elastic(rng, number) for number in range(rng.choice((1, 4, 12)))]
        # One that is ready by its role, so that nobody has to stand in.
        able = replace(pairs[0][0], connected=True, draining=False, is_suspect=False, max_model_len=0)
        able = replace(
            able, bending=replace(able.bending, role="decode"), model_names=("m", "n"), adapters=("a:1", "b:2")
        )
        pairs[0] = able, replace(pairs[0][1], bending=able.bending)
        decodes = [make_decode(rng, number) for number in range(3)] + [pair[0] for pair in pairs]
        # Whether somebody of a model was heard is asked of all of its workers, whatever their roles.
        decodes = [replace(each, is_suspect=False) for each in decodes]
        prefills = [make_prefill(rng, number) for number in range(3)] + [pair[1] for pair in pairs]
        fixed_decodes = [replace(each, bending=FIXED) for each in decodes if each.bending.role != "prefill"]
        fixed_prefills = [replace(each, bending=FIXED) for each in prefills if each.bending.role != "decode"]
        for _ in range(4):
            request = replace(
                make_request(rng, [each.worker_id for each in decodes]),
                numerics="",
                model="m",
                objectives=NO_OBJECTIVES,
            )
            request = replace(request, fingerprints=None)
            bent = choose(request, DecodeTable(decodes), PrefillTable(prefills), policy=policy)
            fixed = choose(request, DecodeTable(fixed_decodes), PrefillTable(fixed_prefills), policy=policy)
            assert type(bent) is type(fixed)
            if isinstance(bent, Decision) and isinstance(fixed, Decision):
                assert (bent.decode_terms, bent.prefill_terms) == (fixed.decode_terms, fixed.prefill_terms)
                assert (bent.prefilled_by, bent.sources, bent.deflected) == (fixed.prefilled_by, fixed.sources, "")
                num_decisions += 1
    assert num_decisions > 100


# ---- what it says is data ---------------------------------------------------------


@pytest.mark.parametrize("tpot_s", [0.0, -1.0, float("nan"), float("inf"), 1e300])
def test_a_bound_that_is_no_sane_number_bounds_nothing(tpot_s):
    assert budgets_from_proto(pb.Budgets(role="decode", tpot_s=tpot_s)) == UNBOUND


def test_budgets_are_taken_as_they_are_said():
    assert budgets_from_proto(pb.Budgets(tpot_s=0.05, prompt_tokens=0)) == Budgets(0.05, 0)
    assert budgets_from_proto(pb.Budgets(prompt_tokens=2**32 - 1)).prompt_tokens == UNLIMITED
    assert role_from_proto(pb.Budgets(role="prefill"), "decode") == "prefill"
    assert role_from_proto(pb.Budgets(role="both"), "prefill") == "prefill"


# ---- how fast they are ---------------------------------------------------------------


def test_what_prompts_cost_say_those_who_compute_them_and_what_streams_cost_those_who_decode():
    known = ModelRates()
    prompts = Rates(base_s=1.0, prompt_token_s=2e-3, running_s=1.0, num_steps=10, spread=0.1)
    streams = Rates(base_s=0.006, prompt_token_s=1e-5, running_s=1e-3, num_steps=500, spread=0.2)
    known.put_streams("d", streams)
    assert known.mean().base_s == streams.base_s
    known.prompts.put("p", prompts)
    mean = known.mean()
    assert (mean.prompt_token_s, mean.base_s, mean.running_s) == pytest.approx((2e-3, 0.006, 1e-3))
    assert mean.spread == pytest.approx(0.2)
    assert known.mean() is mean


# ---- room for more ------------------------------------------------------------------


def bent(role: str, num_outstanding: int, num_tokens: int):
    bending = Bending(role)  # type: ignore[arg-type]
    facts = {"num_waiting_tokens": num_tokens, "bending": bending}
    return decode(role, num_outstanding, **facts), replace(prefill(role, num_tokens), bending=bending)


def test_seats_and_queues_are_those_of_the_roles_or_of_all_where_they_bend():
    pairs = [bent("prefill", 0, 600), bent("decode", 7, 0)]
    still = StillWorkers([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    by_role, bending = (Headroom(still, 0.5, bends) for bends in (False, True))  # type: ignore[arg-type]
    assert (by_role.num_seats("m"), by_role.front_tokens("m"), by_role.num_prefilling("m")) == (8, 600, 1)
    assert (bending.num_seats("m"), bending.front_tokens("m"), bending.num_prefilling("m")) == (16, 0, 2)
    assert not by_role.has_room("m", 0, 0)
    assert bending.has_room("m", 0, 0)


def test_prefill_workers_alone_stand_in_for_decode_workers():
    pair = bent("prefill", 0, 100)
    headroom = Headroom(StillWorkers([pair[0]], [pair[1]]), 0.5)  # type: ignore[arg-type]
    assert (headroom.num_seats("m"), headroom.front_tokens("m"), headroom.num_prefilling("m")) == (8, 100, 1)
