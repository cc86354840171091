"""Every state that an order can reach is right, and leads to its end."""

from __future__ import annotations

from unittest import mock

import pytest

from kvstore.errors import IllegalTransition
from services.prefill import order as orders
from services.prefill.order import OrderAction, OrderEvent, OrderState
from services.worker.states import States
from tests.states.explore import Findings, Model, explore
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


@pytest.mark.parametrize(
    ("state", "event", "row", "says"),
    [
        (OrderState.QUEUED, OrderEvent.HUNG_UP, (OrderState.SETTLED, ()), "a place in the engine"),
        (OrderState.COMPUTING, OrderEvent.EXPIRED, (OrderState.SETTLED, (OrderAction.FAIL,)), "is illegal in SETTLED"),
        (OrderState.CLOSING, OrderEvent.LEASE_CLOSED, (OrderState.SETTLED, ()), "pinned blocks"),
        (OrderState.LENT, OrderEvent.STOPPED, (OrderState.LENT, (OrderAction.FAIL,)), "two last events"),
    ],
)
def test_a_row_that_does_too_little_or_too_much_is_found(
    state: OrderState, event: OrderEvent, row: tuple[OrderState, tuple[OrderAction, ...]], says: str
) -> None:
    with mock.patch.dict(orders.TRANSITIONS[state], {event: row}):
        found = explore(OrderModel())
    assert says in found.violation
    assert found.story


def test_what_has_no_row_raises_with_the_history() -> None:
    states = States("r", orders.TRANSITIONS, OrderState.PREPARING)
    states.move(OrderEvent.PREPARED)
    with pytest.raises(IllegalTransition, match=r"r: CHUNK is illegal in QUEUED\. History: PREPARING <- PREPARED"):
        states.move(OrderEvent.CHUNK)
