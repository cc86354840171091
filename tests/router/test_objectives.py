"""Objectives are read from the settings, go with a request, and what its client got is told where it ended."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.budgets import Objectives
from services.router.config import RouterConfig
from services.router.finished import Account, Finished
from services.router.objectives import ObjectiveTable
from services.settings import SettingsError
from tests.router.scripted_fleet import ScriptedWorker, scripted_fleet


def test_what_is_not_set_is_no_objective():
    table = RouterConfig().read_objectives()
    assert not table
    assert table.of_request("acme", 3) == Objectives()


def test_the_least_objective_is_one_that_can_be_divided_by():
    table = ObjectiveTable.of(1e-322, 1e-320, ["tenant=acme:ttft=1e-323"])
    for each in (table.everybody, table.of_request("acme", 0)):
        assert each == Objectives(1e-6, 1e-6)


def test_a_tenants_go_before_its_prioritys_and_those_before_everybodys():
    entries = ("priority=0:ttft=500,tpot=40", "priority=-2:tpot=0", "tenant=acme:ttft=800")
    table = RouterConfig(ttft_objective=1500, tpot_objective=80, objectives=entries).read_objectives()
    assert table.of_request("", 7) == Objectives(1.5, 0.08)
    assert table.of_request("", 0) == Objectives(0.5, 0.04)
    assert table.of_request("acme", 7) == Objectives(0.8, 0.08)
    assert table.of_request("acme", 0) == Objectives(0.8, 0.04)
    assert table.of_request("", -2) == Objectives(1.5, math.inf)
    assert ObjectiveTable.of(0, 0, entries)


def test_an_environment_variable_says_the_same_with_its_commas():
    whole = ("priority=0:ttft=500,tpot=40", "tenant=acme:ttft=800")
    parts = ("priority=0:ttft=500", "tpot=40", "tenant=acme:ttft=800")
    assert ObjectiveTable.of(0, 0, whole) == ObjectiveTable.of(0, 0, parts)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("ttft=500", "priority=0:ttft"),
        ("model=m:ttft=500", "priority=0:ttft"),
        ("tenant=:ttft=500", "priority=0:ttft"),
        ("priority=high:ttft=500", "'high', which is no whole number"),
        ("priority=0:itl=5", "ttft or tpot"),
        ("priority=0:ttft=5,ttft=6", "each once"),
        ("priority=0:ttft=soon", "'soon', which is no number of milliseconds"),
        ("priority=0:ttft=-1", "no number of milliseconds"),
        ("priority=0:ttft=nan", "no number of milliseconds"),
    ],
)
def test_a_malformed_entry_is_named(entry, words):
    with pytest.raises(SettingsError, match=words) as caught:
        RouterConfig(objectives=(entry, "tenant=fine:ttft=1"))
    assert caught.value.setting == "objectives"


def test_naming_somebody_twice_is_refused():
    with pytest.raises(SettingsError, match="tenant acme twice"):
        RouterConfig(objectives=("tenant=acme:ttft=1", "tenant=acme:tpot=1"))


@given(
    first_s=st.none() | st.floats(0, 10),
    per_token_s=st.floats(0, 1),
    num_tokens=st.integers(1, 50),
    reason=st.sampled_from(["stop", "error"]),
)
def test_a_good_request_has_met_both_objectives_and_has_not_failed(first_s, per_token_s, num_tokens, reason):
    told: list[Finished] = []
    account = Account("acme", 1, Objectives(1.5, 0.08), told.append)
    last_s = None if first_s is None else 100 + first_s + per_token_s * (num_tokens - 1)
    account.settle(
        "m",
        reason,
        512,
        0,
        num_tokens,
        arrived_s=100.0,
        first_token_s=None if first_s is None else 100 + first_s,
        last_token_s=last_s,
        unix_s=200.0,
    )
    (ended,) = told
    assert (ended.tpot_s is None) == (first_s is None or num_tokens == 1)
    if first_s is None or reason == "error" or first_s > 1.51 or (num_tokens > 1 and per_token_s > 0.081):
        assert not ended.is_good
    elif first_s < 1.49 and per_token_s < 0.079:
        assert ended.is_good


async def test_an_order_names_only_an_objective_that_is_tighter_than_everybodys(model_directory):
    config = RouterConfig(
        tpot_objective=80, scheduling_policy="priority", objectives=("priority=0:tpot=40", "priority=9:tpot=500")
    )
    async with scripted_fleet(config) as fleet:
        worker = ScriptedWorker(str(model_directory))
        await fleet.serve_with(worker)
        for priority in (0, 1, 9):
            await fleet.ask(prompt="a b c", max_tokens=2, priority=priority)
    assert [order.tpot_objective_s for order in worker.orders] == [0.04, 0.0, 0.0]


async def test_receipts_say_what_the_client_was_to_get(model_directory):
    async with scripted_fleet(RouterConfig(ttft_objective=1500)) as fleet:
        await fleet.serve_with(ScriptedWorker(str(model_directory)))
        answer = await fleet.ask(prompt="a b c", max_tokens=2, receipt=True)
    (receipt,) = answer.receipts
    assert receipt["objectives"] == {"ttft_seconds": 1.5, "tpot_seconds": None}
    assert receipt["deflected"] is None
