"""The line of every ten seconds: what it says, when it is silent, and that it says what /metrics says."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest
from prometheus_client import CollectorRegistry
from tandem.v1 import worker_pb2 as pb

from services.activity import Activity, Sample, activity_logged, recent_handoffs, sample
from services.lifecycle import Event, Timeline
from services.metric_families import REQUESTS, STORE
from services.router.metrics import RouterMetrics
from services.router.receipt import make_receipt
from services.store.activity import StoreActivity, store_series
from services.worker.metrics.worker_metrics import RequestMetrics
from tests.waiting import until


class World:
    """A process's series and its clock, set by hand."""

    def __init__(self, own_tokens: int = 0) -> None:
        self.now, self.now_s, self.handoffs_s = Sample(), 0.0, recent_handoffs()
        self.activity = Activity(lambda: self.now, self.handoffs_s, own_tokens, lambda: self.now_s)

    def line(self, now: Sample) -> str:
        self.now, self.now_s = now, self.now_s + 10
        return self.activity.line()


BUSY = Sample(
    prompt_tokens=1000,
    generation_tokens=50,
    prefix_queries=400,
    prefix_hits=100,
    num_running=3,
    num_waiting=2,
    kv_usage=0.25,
)


def test_the_line_has_vllms_words_and_the_handoff() -> None:
    world = World()
    world.handoffs_s.extend([0.01, 0.03, 0.02])
    assert world.line(BUSY) == (
        "Avg prompt throughput: 100.0 tokens/s, Avg generation throughput: 5.0 tokens/s, Running: 3 reqs, "
        "Waiting: 2 reqs, GPU KV cache usage: 25.0%, Prefix cache hit rate: 25.0%, Handoff p50: 20.0 ms"
    )


def test_a_quiet_time_begins_with_a_line_of_zeros_and_is_silent_then() -> None:
    world = World()
    assert world.line(Sample()) == ""
    idle = Sample(prompt_tokens=1000, generation_tokens=50, prefix_queries=400, prefix_hits=100)
    assert "Handoff" not in world.line(BUSY)
    assert world.line(idle).startswith("Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 0.0 tokens/s")
    assert world.line(idle) == ""


def test_requests_that_get_no_tokens_are_no_quiet_time() -> None:
    world = World()
    stuck = Sample(num_running=1)
    assert [bool(world.line(stuck)) for _ in range(3)] == [True, True, True]


def test_the_launchers_own_request_is_not_spoken_of() -> None:
    world = World(own_tokens=1)
    assert world.line(Sample(num_running=1)) == ""
    assert world.line(Sample(prompt_tokens=48, generation_tokens=1)) == ""
    assert world.line(Sample(prompt_tokens=58, generation_tokens=1, num_running=1)) != ""


def test_the_figures_are_those_of_the_exported_series_of_all_models() -> None:
    registry = CollectorRegistry()
    tokens = REQUESTS.counter("vllm:generation_tokens", registry)
    running = REQUESTS.gauge("vllm:num_requests_running", registry)
    for model, number in (("a", 1), ("b", 2)):
        tokens.labels(model, "router").inc(number * 10)
        running.labels(model, "router").inc(number)
    assert sample(registry) == Sample(generation_tokens=30, num_running=3)


async def test_lines_are_logged_while_there_is_something_to_say(caplog: pytest.LogCaptureFixture) -> None:
    said, lines = asyncio.Event(), iter(["", "busy"])

    def line() -> str:
        text = next(lines, "")
        if text:
            said.set()
        return text

    with caplog.at_level(logging.INFO, "services.activity"):
        async with activity_logged(line, logging.INFO, interval_s=0.001):
            await said.wait()
        async with activity_logged(lambda: 1 / 0 and "", logging.INFO, interval_s=0.001):
            await until(lambda: len(caplog.records) == 2)
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR"]
    assert caplog.records[0].message == "busy"


def test_a_store_node_says_what_it_took_in_and_gave() -> None:
    registry = CollectorRegistry()
    queries, pulled = (
        STORE.counter("tandem:store_queries", registry),
        STORE.counter("tandem:store_pulled_bytes", registry),
    )
    blocks, slots = STORE.gauge("tandem:store_blocks", registry), STORE.gauge("tandem:store_slots", registry)
    now_s = [0.0]
    activity = StoreActivity(lambda: store_series(registry), lambda: now_s[0])
    assert activity.line() == ""
    now_s[0] = 10.0
    blocks.labels("dram").set(7)
    slots.set(8)
    pulled.inc(5_000_000)
    queries.labels("disk").inc(30)
    queries.labels("none").inc(10)
    assert activity.line() == (
        "Blocks in memory: 7 of 8, on disk: 0, Taken in: 0.5 MB/s, Asked for: 4.0 blocks/s, Hit rate: 75.0%"
    )


def test_router_and_decode_worker_note_how_long_handoffs_took_and_no_local_prefill() -> None:
    stamps = {Event.PREFILL_FINISHED: 10.0, Event.DECODE_JOINED: 10.25, Event.FIRST_TOKEN: 11.0, Event.FINISHED: 12.0}
    handed_over, local = pb.Usage(num_transferred_blocks=4), pb.Usage(prefilled_locally=True)
    router, worker = RouterMetrics(), RequestMetrics(CollectorRegistry())
    for usage in (handed_over, local):
        sent = [pb.Stamp(event=event, unix_s=unix_s) for event, unix_s in stamps.items()]
        own = {Event.ARRIVED: 8.0, Event.TOKENIZED: 8.1, Event.ROUTED: 8.2, Event.FINISHED: 12.1}
        sizes = {"block_size": 32, "num_attempts": 1, "num_generated_tokens": 1}
        router.count_receipt(make_receipt(0, usage, sent, own, decode_worker_id="d", numerics="", **sizes))
        worker.finished(Timeline(time.time, dict(stamps)), usage, pb.FINISH_REASON_STOP)
    assert list(router.handoffs_s) == list(worker.handoffs_s) == [0.25]
