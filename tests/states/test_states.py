"""Every state that an order or a live request can reach is right, and leads to its end."""

from __future__ import annotations

from enum import Enum
from typing import Any
from unittest import mock

import pytest

from kvstore.errors import IllegalTransition
from services.decode import stages
from services.decode.stages import LiveAction, LiveEvent, LiveState
from services.prefill import order as orders
from services.prefill.order import OrderAction, OrderEvent, OrderState
from services.worker.states import States
from tests.states.explore import Findings, Model, explore
from tests.states.live import LiveModel
from tests.states.order import OrderModel
from tests.states.rows import all_rows, seeing_rows


def explored(model: Model) -> tuple[Findings, set[str]]:
    met: set[str] = set()
    with seeing_rows(met.add):
        found = explore(model)
    return found, met


def test_wherever_an_order_is_whatever_happens_it_has_one_end_and_gives_its_blocks_back_once() -> None:
    found, met = explored(OrderModel())
    assert not found.violation, "\n".join((*found.story, found.violation))
    assert found.num_states > 1_000
    assert met == {row for row in all_rows() if row.startswith("order")}


def test_wherever_a_live_request_is_whatever_happens_it_has_one_last_output_and_leaves_nothing() -> None:
    found, met = explored(LiveModel())
    assert not found.violation, "\n".join((*found.story, found.violation))
    assert found.num_states > 1_000
    assert met == {row for row in all_rows() if row.startswith("live")}


_O, _L = OrderState, LiveState
TOO_LITTLE_OR_TOO_MUCH: list[tuple[Enum, Enum, tuple[Enum, tuple[Enum, ...]], str]] = [
    (_O.QUEUED, OrderEvent.HUNG_UP, (_O.SETTLED, ()), "a place in the engine"),
    (_O.COMPUTING, OrderEvent.EXPIRED, (_O.SETTLED, (OrderAction.FAIL,)), "is illegal in SETTLED"),
    (_O.CLOSING, OrderEvent.LEASE_CLOSED, (_O.SETTLED, ()), "pinned blocks"),
    (_O.LENT, OrderEvent.STOPPED, (_O.LENT, (OrderAction.FAIL,)), "two last events"),
    (_L.QUEUED, LiveEvent.ABORTED, (_L.ENDED, (LiveAction.END,)), "a place in the engine"),
    (_L.DECODING, LiveEvent.EXPIRED, (_L.ENDED, (LiveAction.CANCEL, LiveAction.DROP)), "its last output"),
    (_L.REDIRECTED, LiveEvent.GIVEN_UP, (_L.QUEUED, ()), "it would wait for ever"),
    (_L.LEAVING, LiveEvent.GIVEN_UP, (_L.LEAVING, ()), "it would wait for ever"),
    (_L.QUEUED, LiveEvent.REDIRECT_ASKED, (_L.QUEUED, (LiveAction.AIM, LiveAction.RETRACT)), "is illegal in QUEUED"),
    (_L.DECODING, LiveEvent.REDIRECT_ASKED, (_L.DECODING, (LiveAction.ADMIT,)), "two admissions at a time"),
    (_L.ENDED, LiveEvent.LET_GO, (_L.ENDED, ()), "blocks that it left"),
    (_L.ENDED, LiveEvent.TOKENS, (_L.ENDED, (LiveAction.SAY,)), "tokens come after the last output"),
    (_L.LEAVING, LiveEvent.LAST, (_L.LEAVING, (LiveAction.END,)), "two last outputs"),
]


@pytest.mark.parametrize(("state", "event", "row", "says"), TOO_LITTLE_OR_TOO_MUCH)
def test_a_row_that_does_too_little_or_too_much_is_found(state: Any, event: Any, row: Any, says: str) -> None:
    is_order = isinstance(state, OrderState)
    table: Any = orders.TRANSITIONS if is_order else stages.TRANSITIONS
    with mock.patch.dict(table, {state: {**table[state], event: row}}):
        found = explore(OrderModel() if is_order else LiveModel())
    assert says in found.violation
    assert found.story


def test_what_has_no_row_raises_with_the_history() -> None:
    states = States("r", orders.TRANSITIONS, OrderState.PREPARING)
    states.move(OrderEvent.PREPARED)
    with pytest.raises(IllegalTransition, match=r"r: CHUNK is illegal in QUEUED\. History: PREPARING <- PREPARED"):
        states.move(OrderEvent.CHUNK)
