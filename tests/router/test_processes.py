"""What several processes of a router are together: their sums, their answers, their parts of the settings."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.config import RouterConfig
from services.router.metrics import RouterMetrics, text_of
from services.router.processes.hub import Hub
from services.router.processes.messages import METRICS, Answer, Answers, Ask
from services.router.processes.parent import divided
from services.router.processes.request_ids import new_request_id, number_in
from services.router.processes.series import Family, Sample, Snapshot, Totals, merged
from services.router.views import READINESS, WORKERS
from services.settings import SettingsError


def snapshot(counted: float, running: float = 0.0) -> Snapshot:
    return Snapshot(
        [
            Family("asked", "help.", "counter", "", "sum", [Sample("asked_total", {"model": "m"}, counted)]),
            Family("running", "help.", "gauge", "", "sum", [Sample("running", {}, running)]),
            Family("up", "help.", "gauge", "", "min", [Sample("up", {}, running)]),
        ]
    )


def values(of: Snapshot) -> dict[str, float]:
    return {sample.name: sample.value for family in of.families for sample in family.samples}


def test_counts_add_up_and_gauges_are_joined_as_declared():
    assert values(merged([snapshot(3, 1), snapshot(4, 2)])) == {"asked_total": 7, "running": 3, "up": 1}


STEPS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["count", "answer", "die"])), max_size=60)


@given(STEPS)
def test_a_counter_never_goes_backwards_whoever_dies_or_does_not_answer(steps):
    totals, counted = Totals(), {1: 0.0, 2: 0.0, 3: 0.0}
    shown = told = lost = 0.0
    last = dict.fromkeys(counted, 0.0)
    for number, what in steps:
        if what == "count":
            counted[number] += 1
        elif what == "answer":
            totals.note(number, snapshot(counted[number]))
            told += counted[number] - last[number]
            last[number] = counted[number]
        else:
            totals.end(number)
            lost += counted[number] - last[number]
            counted[number] = last[number] = 0.0
        now = values(totals.snapshot()).get("asked_total", 0.0)
        assert now >= shown
        assert now == told  # nothing twice, and nothing that somebody has seen is lost
        shown = now


def test_what_a_dead_process_measured_is_gone():
    totals = Totals()
    totals.note(1, snapshot(3, running=2))
    totals.note(2, snapshot(4, running=1))
    totals.end(1)
    assert values(totals.snapshot()) == {"asked_total": 7, "running": 1, "up": 1}


def test_the_series_of_one_process_look_the_same_by_way_of_a_snapshot():
    metrics = RouterMetrics()
    metrics.for_model("m").count_finished("stop")
    metrics.count_refusal("queue_full")

    def steady(text: bytes) -> list[str]:
        return [line for line in text.decode().splitlines() if not line.startswith("process_")]

    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(metrics.snapshot()), type=Snapshot)
    assert steady(text_of(merged([wire]))) == steady(metrics.exposition())


def test_an_id_of_ours_names_its_process_and_no_other_does():
    assert [number_in(new_request_id(number)) for number in (0, 1, 7, 64)] == [0, 1, 7, 64]
    assert [number_in(text) for text in ("", "mine", "p1-mine", "p0-" + "0" * 32, "p1-" + "g" * 32)] == [0] * 5


def test_what_bounds_the_router_is_divided():
    config = divided(RouterConfig(router_workers=4, max_concurrent_requests=10, max_queue=0, tokenizer_pool_size=3))
    assert (config.max_concurrent_requests, config.max_queue, config.tokenizer_pool_size) == (3, 0, 3)
    assert (config.request_memory_bytes, config.worker_backlog_s) == (16 << 20, 0.125)


def test_parts_of_the_request_memory_that_hold_no_body_are_refused():
    with pytest.raises(SettingsError, match="--request-memory-bytes") as caught:
        RouterConfig(router_workers=16)
    assert caught.value.setting == "router_workers"
    RouterConfig(router_workers=16, request_memory_bytes=256 << 20)


def test_a_model_is_ready_that_every_process_can_serve():
    both = READINESS.merge([(["a", "b"], {"c": "no worker"}), (["b"], {"a": "being loaded", "c": "no worker"})])
    assert both == (["b"], {"a": "being loaded", "c": "no worker"})
    late = READINESS.merge([(["a"], {}), ([], {})])
    assert late == ([], {"a": "one process of this router does not know it yet"})


def test_a_worker_is_connected_that_every_process_can_use():
    def row(worker_id: str, connected: bool) -> dict[str, object]:
        return {"worker_id": worker_id, "incarnation": "1", "connected": connected}

    rows = WORKERS.merge([[row("a", True), row("b", True), row("c", True)], [row("a", True), row("b", False)]])
    assert [(each["worker_id"], each["connected"]) for each in rows] == [("a", True), ("b", False), ("c", False)]


class _Process:
    """One that answers each question with a value, or not at all."""

    def __init__(self, hub: Hub, value: object) -> None:
        self._hub = hub
        self.value = value
        self.asked: list[Ask] = []
        self.answers: asyncio.Queue[list[msgspec.Raw]] = asyncio.Queue()

    def send(self, message: Ask | Answers) -> bool:
        if isinstance(message, Answers):
            self.answers.put_nowait(message.values)
        else:
            self.asked.append(message)
            if self.value is not None:
                value = msgspec.Raw(msgspec.msgpack.encode(self.value))
                asyncio.get_running_loop().call_soon(self._hub.answered, Answer(message.id, [value]))
        return True

    async def ask(self, view: str, to: int = 0) -> list[object]:
        self._hub.asked(self, Ask(1, view, msgspec.Raw(msgspec.msgpack.encode(())), to))
        return [msgspec.msgpack.decode(value) for value in await self.answers.get()]


def processes(*given: object) -> tuple[Hub, list[_Process]]:
    hub = Hub()
    made = [_Process(hub, value) for value in given]
    for number, process in enumerate(made, 1):
        hub.join(number, process)
    return hub, made


async def test_a_question_goes_to_all_or_to_the_one_that_is_named():
    _, (one, two) = processes("a", "b")
    assert await one.ask("view") == ["a", "b"]
    assert await one.ask("view", to=2) == ["b"]
    assert await two.ask("view", to=3) == []
    assert (len(one.asked), len(two.asked)) == (1, 2)


async def test_who_asks_the_same_at_the_same_time_shares_the_answers():
    _, (one, two) = processes("a", "b")
    assert await asyncio.gather(one.ask("view"), two.ask("view")) == [["a", "b"], ["a", "b"]]
    assert len(one.asked) == len(two.asked) == 1


async def test_one_that_does_not_answer_is_done_without_and_its_last_counts_stand():
    hub, (one, two) = processes(snapshot(1, 1), snapshot(10, 10))
    (before,) = await one.ask(METRICS)
    two.value = None
    one.value = snapshot(2, 1)
    (after,) = await one.ask(METRICS)
    totals = [values(msgspec.convert(each, Snapshot))["asked_total"] for each in (before, after)]
    hub.leave(2)
    (last,) = await one.ask(METRICS)
    assert [*totals, values(msgspec.convert(last, Snapshot))["asked_total"]] == [11, 12, 12]
