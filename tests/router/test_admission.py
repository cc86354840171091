"""The bounded entrance: room, queue, refusal."""

from __future__ import annotations

import asyncio

import pytest

from services.router.admission import Admission
from services.router.errors import ApiError
from tests.router.harness import until


class Visitor:
    """A task that enters, and stays until told to go."""

    def __init__(self, admission: Admission, weight: int = 1) -> None:
        self.inside = False
        self._go = asyncio.Event()
        self.task = asyncio.create_task(self._visit(admission, weight))

    async def _visit(self, admission: Admission, weight: int) -> None:
        async with admission.admit(weight):
            self.inside = True
            await self._go.wait()
        self.inside = False

    async def leave(self) -> None:
        self._go.set()
        await self.task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_lets_in_in_order_as_room_comes():
    admission = Admission(2, max_queue=5)
    visitors = [Visitor(admission) for _ in range(4)]
    await settle()
    assert [visitor.inside for visitor in visitors] == [True, True, False, False]
    assert (admission.num_running, admission.num_waiting) == (2, 2)
    await visitors[1].leave()
    await settle()
    assert [visitor.inside for visitor in visitors] == [True, False, True, False]
    for visitor in visitors[:1] + visitors[2:]:
        await until(lambda visitor=visitor: visitor.inside)
        await visitor.leave()
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_refuses_when_the_queue_is_full():
    admission = Admission(1, max_queue=0)
    visitor = Visitor(admission)
    await settle()
    with pytest.raises(ApiError) as caught:
        async with admission.admit(1):
            pass
    assert caught.value.status == 429
    assert caught.value.retry_after_s is not None
    await visitor.leave()


async def test_a_big_request_is_not_overtaken_and_one_bigger_than_all_room_gets_in_alone():
    admission = Admission(2, max_queue=10)
    small, big, later = Visitor(admission), Visitor(admission, 7), Visitor(admission)
    await settle()
    assert (small.inside, big.inside, later.inside) == (True, False, False)
    await small.leave()
    await settle()
    assert (big.inside, later.inside) == (True, False)
    await big.leave()
    await until(lambda: later.inside)
    await later.leave()
    assert admission.num_running == 0


async def test_one_who_gives_up_waiting_leaves_no_trace():
    admission = Admission(1, max_queue=5)
    first, waiting, last = Visitor(admission), Visitor(admission), Visitor(admission)
    await settle()
    waiting.task.cancel()
    await settle()
    assert admission.num_waiting == 1
    await first.leave()
    await until(lambda: last.inside)
    await last.leave()
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_one_who_gives_up_at_the_moment_of_being_let_in_passes_the_room_on():
    admission = Admission(1, max_queue=5)
    first, unlucky, last = Visitor(admission), Visitor(admission), Visitor(admission)
    await settle()
    first._go.set()
    await first.task  # has let `unlucky` in, which has not run since
    unlucky.task.cancel()
    await until(lambda: last.inside)
    await last.leave()
    assert (admission.num_running, admission.num_waiting) == (0, 0)
