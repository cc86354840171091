"""Prompts and answers go elsewhere than by the workers' roles where objectives would be missed otherwise."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.v1 import worker_pb2 as pb

from services.budgets import UNLIMITED, Objectives
from services.rates import Rates
from services.router.config import RouterConfig
from services.router.routing import (
    Bending,
    CostModel,
    Decision,
    DecodeCandidate,
    KnownPrefix,
    PrefillCandidate,
    RoutedRequest,
)
from tests.router.choosing import choose
from tests.router.scripted_fleet import ScriptedWorker, scripted_fleet

# About a core of a small processor: 512 tokens take 0.8 s, a step with few streams 8 ms.
RATES = Rates(
    base_s=0.006,
    prompt_token_s=1.5e-3,
    prompt_pair_s=1e-7,
    running_s=5e-4,
    context_token_s=1e-6,
    spread=0.1,
    num_steps=99,
)
COST = CostModel(RATES)
OBJECTIVES = Objectives(1.5, 0.08)
PREFILL, DECODE = Bending("prefill", 0.08), Bending("decode", 0.064, 128)


def worker(name: str, bending: Bending, waiting: int = 0, streams: int = 0) -> tuple[DecodeCandidate, PrefillCandidate]:
    """The two rows of an elastic worker; its streams have 300 tokens each."""
    bending = replace(bending, num_running=streams, num_context_tokens=300 * streams)
    decode = DecodeCandidate(
        name, "1", ("m",), "f", True, False, streams, waiting, 64, 1000, 1000, max_model_len=4096, bending=bending
    )
    prefill = PrefillCandidate(
        name, "1", f"{name}:1", f"{name}:2", ("m",), "f", False, waiting, max_model_len=4096, bending=bending
    )
    return decode, prefill


def request(num_tokens: int = 512, objectives: Objectives = OBJECTIVES, num_output: float = 64) -> RoutedRequest:
    prefixes = {"f": KnownPrefix(32, num_tokens // 32)}
    return RoutedRequest("m", num_tokens, b"key", prefixes, objectives=objectives, num_output_tokens=num_output)


def chosen(
    asked: RoutedRequest, *workers: tuple[DecodeCandidate, PrefillCandidate], cost: CostModel = COST
) -> Decision:
    decision = choose(asked, [pair[0] for pair in workers], [pair[1] for pair in workers], cost=cost)
    assert isinstance(decision, Decision)
    return decision


# ---- prompts ------------------------------------------------------------------------


def test_a_prompt_that_is_in_time_goes_to_the_prefill_worker():
    decision = chosen(request(), worker("p", PREFILL), worker("d", DECODE, streams=5))
    assert (decision.decode.worker_id, decision.prefilled_by.worker_id, decision.deflected) == ("d", "p", "")
    assert decision.decode_terms[0].late == 0
    assert decision.weighed is not None
    assert decision.weighed.slack_tokens > 0
    assert "tokens more in front that way is late" in decision.reason


def test_a_prompt_that_would_be_late_is_computed_where_it_decodes():
    decision = chosen(request(), worker("p", PREFILL, waiting=700), worker("d", DECODE, streams=5))
    assert (decision.decode.worker_id, decision.prefilled_by.worker_id, decision.deflected) == ("d", "d", "prompt")
    assert decision.cause == "deflected"
    assert decision.weighed is not None
    assert "tokens fewer in front that way is in time" in decision.reason
    # What would have changed it does.
    fewer = math.floor(700 + decision.weighed.slack_tokens)
    assert chosen(request(), worker("p", PREFILL, waiting=fewer), worker("d", DECODE, streams=5)).deflected == ""
    assert chosen(request(), worker("p", PREFILL, waiting=fewer + 2), worker("d", DECODE, streams=5)).deflected
    assert [each.worker_id for each in decision.prefill] == ["p"]  # should second thoughts come


def test_a_late_prompt_stays_with_the_prefill_worker_where_it_is_sooner_there():
    busy = worker("d", Bending("decode", 0.064, 32), waiting=3000, streams=40)
    assert chosen(request(), worker("p", PREFILL, waiting=700), busy).deflected == ""


def test_what_a_request_has_waited_counts():
    fresh, late = request(), request(objectives=Objectives(0.3, 0.08))
    workers = worker("p", PREFILL), worker("d", DECODE)
    assert chosen(fresh, *workers).deflected == ""
    assert chosen(late, *workers).deflected == ""  # idle both: it is not sooner there
    workers = worker("p", PREFILL, waiting=200), worker("d", DECODE)
    assert chosen(fresh, *workers).deflected == ""
    assert chosen(late, *workers).deflected == "prompt"


def test_a_worker_without_room_beside_its_streams_is_no_way_out():
    full = worker("d", Bending("decode", 0.02, 128), streams=40)
    decision = chosen(request(), worker("p", PREFILL, waiting=700), full)
    assert decision.deflected == ""
    assert decision.weighed is not None
    assert math.isfinite(decision.weighed.local_s)


# ---- answers ------------------------------------------------------------------------


def test_an_idle_prefill_worker_keeps_short_answers():
    workers = worker("p", PREFILL), worker("d", DECODE, streams=20)
    short, long = (chosen(request(num_output=number), *workers) for number in (4, 400))
    assert (short.decode.worker_id, short.prefilled_by.worker_id, short.deflected) == ("p", "p", "answer")
    assert short.prefill == ()
    assert (long.decode.worker_id, long.deflected) == ("d", "")
    busy = worker("p", PREFILL, waiting=1)
    assert chosen(request(num_output=4), busy, workers[1]).decode.worker_id == "d"


def test_an_idle_prefill_worker_keeps_answers_that_would_stall_all_streams():
    crowded = worker("d", DECODE, streams=150)
    decision = chosen(request(num_output=64), worker("p", PREFILL), crowded)
    assert (decision.decode.worker_id, decision.deflected) == ("p", "answer")
    assert next(terms for terms in decision.decode_terms if terms.worker_id == "d").stall > 0


def test_a_request_s_own_pace_counts_where_it_is_tighter():
    paces = [worker("a", DECODE, streams=30), worker("b", DECODE, streams=31)]
    for tpot_s, stalls in ((0.08, False), (0.01, True)):
        decision = chosen(request(objectives=Objectives(math.inf, tpot_s)), *paces)
        assert all((terms.stall > 0) == stalls for terms in decision.decode_terms)


# ---- always -----------------------------------------------------------------------

bendings = st.builds(
    Bending,
    st.sampled_from(["prefill", "decode"]),
    st.sampled_from([math.inf, 0.08, 0.064, 0.01]),
    st.sampled_from([UNLIMITED, 128, 32, 0]),
)
workers_of = st.lists(st.tuples(bendings, st.integers(0, 4000), st.integers(0, 60)), min_size=1, max_size=5)
requests_of = st.builds(
    request,
    st.integers(1, 3000),
    st.builds(Objectives, st.floats(0, 20), st.sampled_from([math.inf, 0.08, 0.02])),
    st.floats(1, 500),
)


def fleet(facts) -> list[tuple[DecodeCandidate, PrefillCandidate]]:
    return [worker(f"w{number}", *each) for number, each in enumerate(facts)]


@given(asked=requests_of, facts=workers_of, more=st.integers(1, 5000), place=st.integers(0, 4))
def test_more_in_front_never_makes_a_worker_more_attractive(asked, facts, more, place):
    place %= len(facts)
    before = chosen(asked, *fleet(facts))
    bending, waiting, streams = facts[place]
    after = chosen(asked, *fleet([*facts[:place], (bending, waiting + more, streams), *facts[place + 1 :]]))
    name = f"w{place}"
    for terms in ("prefill_terms", "decode_terms"):
        costs = [{each.worker_id: each.total for each in getattr(decision, terms)} for decision in (before, after)]
        # One that keeps answers only while it is idle is no candidate any more.
        if name in costs[0] and name in costs[1] and (terms == "prefill_terms" or bending.role == "decode"):
            assert costs[1][name] >= costs[0][name] - 1e-6 * abs(costs[0][name])
    if before.prefilled_by.worker_id != name and bending.role == "decode":
        assert after.prefilled_by.worker_id != name or after.deflected == before.deflected


@given(asked=requests_of, facts=workers_of)
def test_a_prompt_is_deflected_only_where_it_would_be_late_and_is_sooner(asked, facts):
    decision = chosen(asked, *fleet(facts))
    if decision.deflected == "prompt":
        assert decision.weighed is not None
        assert decision.weighed.via_s * decision.weighed.margin > asked.objectives.ttft_s
        assert decision.weighed.local_s < decision.weighed.via_s
        is_late_anyway = decision.weighed.local_s * decision.weighed.margin > asked.objectives.ttft_s
        assert not is_late_anyway or decision.weighed.local_s < 0.8 * decision.weighed.via_s
        assert decision.prefilled_by.expected_s == decision.weighed.local_s
        assert decision.decode.bending.role == "decode"
    if decision.weighed is not None:
        json.dumps(decision.weighed.to_json(), allow_nan=False)
    assert all(math.isfinite(terms.total) for terms in (*decision.decode_terms, *decision.prefill_terms))


@settings(max_examples=200)
@given(num_tokens=st.integers(1, 3000), facts=workers_of, num_output=st.floats(1, 500))
def test_where_nothing_is_late_the_choice_is_that_of_the_roles(num_tokens, facts, num_output):
    # No streams and no idle prefill worker: nothing but lateness could change a choice by role.
    unbound = [(Bending(bending.role), waiting + 1, 0) for bending, waiting, _ in facts]
    asked = request(num_tokens, Objectives(ttft_s=1e6), num_output)
    bent, by_role = (chosen(each, *fleet(unbound)) for each in (asked, replace(asked, objectives=Objectives())))
    assert (bent.decode, bent.prefill, bent.deflected) == (by_role.decode, by_role.prefill, by_role.deflected)


# ---- by a router --------------------------------------------------------------------


def elastic(model_directory, role: str, **facts: object) -> ScriptedWorker:
    budgets = pb.Budgets(role=role, tpot_s=0.08)
    return ScriptedWorker(str(model_directory), role="elastic", budgets=budgets, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_waiting", [0, 20_000])
async def test_a_deflected_order_names_no_prefill_worker_and_is_told_of(model_directory, num_waiting):
    async with scripted_fleet(RouterConfig(ttft_objective=1500, worker_backlog_s=0)) as fleet:
        first = elastic(model_directory, "prefill", num_waiting_tokens=num_waiting)
        second = elastic(model_directory, "decode")
        await fleet.serve_with(first, second)
        answer = await fleet.ask(prompt="a b c " * 30, max_tokens=200, receipt=True)
        (decision,) = fleet.parts.placer.log.find("", "asked")
        told = decision.to_json()
        metrics = fleet.parts.metrics.exposition().decode()
    ((order,),) = [second.orders]
    assert not first.orders
    assert bool(order.prefill_targets) == (num_waiting == 0)
    deflected = "prompt" if num_waiting else None
    assert (answer.receipts[0]["deflected"], told["chosen"]["deflected"]) == (deflected, deflected)  # type: ignore[index]
    assert told["bending"]["prefill_worker_id"] == first.record.worker_id  # type: ignore[index]
    assert f'tandem:router_deflections_total{{direction="decode"}} {float(bool(num_waiting))}' in metrics
