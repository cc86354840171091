"""A decode worker that drains: its live requests go on at another one that has room, and the client gets the same."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from services.orders import MOVES, RESUMES
from services.router.routing import DecodeCandidate, places_to_move_to
from tests.router.direct import Answer
from tests.router.scripted_fleet import ScriptedFleet, ScriptedWorker, scripted_fleet
from tests.waiting import until

LENGTH = 64
PROMPT = list(range(20, 60))
STREAM: dict[str, object] = {
    "prompt": PROMPT,
    "max_tokens": LENGTH,
    "seed": 7,
    "return_token_ids": True,
    "stream": True,
}
BOTH = (RESUMES, MOVES)


@pytest.fixture
def make(model_directory):
    """Makes workers; those with less in front of them are asked first."""

    def make_one(num_outstanding: int = 0, **options: object) -> ScriptedWorker:
        return ScriptedWorker(str(model_directory), num_outstanding, **{"features": BOTH, **options})  # type: ignore[arg-type]

    return make_one


def sample(fleet: ScriptedFleet, series: str) -> float:
    lines = fleet.parts.metrics.exposition().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(series))


async def undisturbed(fleet: ScriptedFleet, make, **body: object) -> Answer:
    await fleet.serve_with(make())
    return await fleet.ask(**body)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("temperature", [0, 1], ids=["greedy", "sampled"])
async def test_the_stream_is_the_same_at_whatever_token_its_worker_drains(make, temperature, n):
    async with scripted_fleet() as fleet:
        body = {**STREAM, "temperature": temperature, "n": n, "receipt": True}
        text = (await undisturbed(fleet, make, **body)).choices()[0]["text"]
        assert isinstance(text, str)
        other = make(1, is_brief=True)
        for logprobs, stop in itertools.product((None, 2), (None, text[-20:-16])):
            asked = body | {"logprobs": logprobs, "stop": stop}
            expected = await undisturbed(fleet, make, **asked)
            num_tokens = len(expected.choices()[0]["token_ids"])  # type: ignore[arg-type]
            assert (num_tokens < LENGTH) == (stop is not None)
            for drained_at in range(1, num_tokens + 1):
                drains, other = make(drains_after=drained_at, is_brief=True), make(1, is_brief=True)
                await fleet.serve_with(drains, other)
                answer = await fleet.ask(**asked)
                assert answer.choices() == expected.choices(), (logprobs, stop, drained_at)
                assert answer.usage == expected.usage
                num_moved = check_orders(answer, drains, other)
                assert num_moved or drained_at > num_tokens - 5, "it ends before it can go"


def check_orders(answer: Answer, drains: ScriptedWorker, other: ScriptedWorker) -> int:
    """Returns how many have moved; a choice that begins later is not sent to the worker that drains."""
    moved = [order for order in other.orders if order.resumed_token_ids]
    for order in moved:
        assert order.move.worker_id == drains.record.worker_id
        assert order.move.incarnation == drains.record.incarnation
        assert order.move.kv_address == drains.record.kv_address
        assert len(order.move.transfer_id) == 16
        assert order.move.num_tokens == len(PROMPT) + len(order.resumed_token_ids) - 1
    assert sum(len(receipt["resumes"]) for receipt in answer.receipts) == len(moved)  # type: ignore[arg-type]
    for receipt in answer.receipts:
        for resume in receipt["resumes"]:  # type: ignore[attr-defined]
            check_moved(resume)
            assert receipt["resumed_elsewhere"] == "exact"
            assert receipt["computed_tokens"] == len(PROMPT) - 3, "as the first worker said"
    return len(moved)


def check_moved(resume: dict[str, object]) -> None:
    assert (resume["reason"], resume["moved"]["blocks"], resume["exact"]) == ("moved", 2, True)  # type: ignore[index]
    assert resume["moved_tokens"] == len(PROMPT) + resume["carried_tokens"]  # type: ignore[operator]
    assert (resume["recomputed_tokens"], resume["reused_tokens"], resume["fetched_tokens"]) == (0, 0, 0)


@pytest.mark.parametrize(
    "other",
    [{"num_free_blocks": 3}, {"num_outstanding": 8}, {"features": (RESUMES,)}, {"drains": True}],
    ids=["no blocks", "no place", "older", "drains too"],
)
async def test_without_room_elsewhere_it_goes_on_where_it_is(make, other):
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **STREAM)
        first, second = make(drains_after=10), make(**{"num_outstanding": 1, **other})
        await fleet.serve_with(first, second)
        answer = await fleet.ask(**STREAM, receipt=True)
        assert answer.choices() == expected.choices()
        assert second.orders == []
        (receipt,) = answer.receipts
        assert (receipt["resumes"], receipt["resumed_elsewhere"]) == ([], None)


@pytest.mark.parametrize("n", [1, 3])
async def test_where_all_drain_at_once_what_has_been_let_go_ends_at_one_of_them(make, n):
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **STREAM, n=n)
        for drained_at in (5, 20, 40):
            first, second = make(drains_after=drained_at), make(drains_after=drained_at - n + 1)
            await fleet.serve_with(first, second)
            asking = asyncio.create_task(fleet.ask(**STREAM, n=n))
            await until(lambda: first.max_moving or second.max_moving)  # noqa: B023
            first.drains = second.drains = True
            assert (await asking).choices() == expected.choices()


async def test_one_that_computes_alike_is_preferred_and_the_receipt_says_where_there_was_none(make):
    async with scripted_fleet() as fleet:
        for alikes, expected in (([make(5)], "exact"), ([], "inexact")):
            first, unlike = make(drains_after=10), make(1, numerics="other")
            await fleet.serve_with(first, unlike, *alikes)
            (receipt,) = (await fleet.ask(**STREAM, receipt=True)).receipts
            assert receipt["resumed_elsewhere"] == expected
            assert receipt["decode_worker_id"] == (alikes or [unlike])[0].record.worker_id


async def test_none_is_moved_to_a_worker_whose_context_is_too_short_for_it(make):
    long = {**STREAM, "max_tokens": 400}
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **long)
        first, short = make(), make(max_model_len=len(PROMPT) + 399)
        await fleet.serve_with(first)
        asking = asyncio.create_task(fleet.ask(**long))
        await until(lambda: first.orders)
        fleet.announce(first, short)
        await until(lambda: fleet.parts.workers.num_sessions_up == 2)
        first.drains = True
        assert (await asking).choices() == expected.choices()
        assert (short.orders, first.max_moving) == ([], 0)


async def test_where_the_next_one_refuses_another_gets_the_same_order(make):
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **STREAM)
        first, second, third = make(drains_after=10), make(1, is_full=True), make(5)
        await fleet.serve_with(first, second, third)
        answer = await fleet.ask(**STREAM)
        assert answer.choices() == expected.choices()
        assert [order.HasField("move") for worker in (second, third) for order in worker.orders] == [True, True]


async def test_what_comes_with_its_blocks_stands_in_nobodys_way(make, monkeypatch):
    async with scripted_fleet() as fleet:
        first, second = make(drains_after=10), make(1)
        await fleet.serve_with(first, second)
        counted: list[tuple[str, int]] = []
        monkeypatch.setattr(fleet.parts.workers, "count_prefill", lambda key, number: counted.append((key[0], number)))
        await fleet.ask(**STREAM)
        assert next(number for worker_id, number in counted if worker_id == first.record.worker_id) == len(PROMPT)
        assert [number for worker_id, number in counted if worker_id == second.record.worker_id] == [0, 0]


async def test_a_few_leave_at_a_time(make):
    async with scripted_fleet() as fleet:
        first, second = make(drains_after=20), make(0, num_free_blocks=900, drains=True)
        await fleet.serve_with(first, second)
        asked = [asyncio.create_task(fleet.ask(**STREAM, n=7))]
        await until(lambda: len(first.orders) == 7)
        second.drains = False
        await asyncio.gather(*asked)
        assert first.max_moving <= 4


async def test_a_client_that_leaves_meanwhile_leaves_nothing_behind(make):
    async with scripted_fleet() as fleet:
        first, second = make(drains_after=10), make(1)
        await fleet.serve_with(first, second)
        asking = asyncio.create_task(fleet.ask(**STREAM))
        await until(lambda: first.max_moving)
        fleet.hang_up()
        await asyncio.wait([asking])
        await until(lambda: fleet.parts.admission.num_running == 0)
        assert not any(worker.num_waiting_tokens for worker in fleet.parts.workers.decode_candidates())


def test_where_a_request_may_go():
    def candidate(worker_id: str, **fields: object) -> DecodeCandidate:
        usual: dict[str, object] = {
            "model_names": ("m",), "model_fingerprint": "f", "connected": True, "draining": False, "num_outstanding": 2,
            "max_num_seqs": 4, "num_blocks": 100, "num_free_blocks": 20, "numerics": "a", "moves": True,
            "max_model_len": 90,
        }  # fmt: skip
        return DecodeCandidate(worker_id, "1", **usual | fields)  # type: ignore[arg-type]

    leaves = candidate("leaves", draining=True)

    def places(*others: DecodeCandidate, num_blocks: int = 10) -> list[str]:
        return [each.worker_id for each in places_to_move_to(leaves, [leaves, *others], "m", num_blocks, 80)]

    assert places(candidate("alike"), candidate("unlike", numerics="b")) == ["alike"]
    assert places(candidate("unlike", numerics="b"), candidate("nameless", numerics="")) == ["unlike", "nameless"]
    assert places(candidate("alike"), num_blocks=17) == ["alike"]
    assert places(candidate("alike"), num_blocks=18) == []
    wrong = {"num_outstanding": 4, "connected": False, "draining": True, "moves": False, "model_fingerprint": "g"}
    for name, value in [*wrong.items(), ("model_names", ("n",)), ("max_model_len", 79)]:
        assert places(candidate("wrong", **{name: value})) == [], name
