"""Receipts: what a sequence cost, on request; and that the counters are the sum of all receipts."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.v1 import worker_pb2 as pb

from services.lifecycle import Event
from services.router.receipt import make_receipt
from tests.router.fake_worker import Script

PROMPT = list(range(100))
TIERS = ("device", "host", "store", "disk")


def usage_of(num_cached: int, fetched=(), **fields) -> pb.Usage:
    usage = pb.Usage(num_prompt_tokens=len(PROMPT), num_cached_tokens=num_cached, **fields)
    for tier, num_blocks in fetched:
        usage.fetched.add(
            holder_id="peer", tier=tier, lane="cma", num_blocks=num_blocks, num_bytes=num_blocks * 1000, seconds=0.5
        )
    return usage


def receipt_of(usage: pb.Usage, stamps=(), own=()):
    return make_receipt(
        0,
        usage,
        [pb.Stamp(event=event, unix_s=unix_s) for event, unix_s in stamps],
        {Event.ARRIVED: 10.0, Event.TOKENIZED: 10.5, Event.ROUTED: 11.0, Event.FINISHED: 20.0, **dict(own)},
        decode_worker_id="d",
        numerics="",
        block_size=32,
        num_attempts=1,
        num_generated_tokens=5,
    )


@given(
    num_cached=st.integers(0, 120),
    fetched=st.lists(st.tuples(st.sampled_from(TIERS), st.integers(0, 5)), max_size=3),
)
def test_every_prompt_token_is_computed_reused_or_fetched(num_cached, fetched):
    receipt = receipt_of(usage_of(num_cached, fetched))
    counts = (receipt.num_computed_tokens, receipt.num_reused_tokens, receipt.num_fetched_tokens)
    assert min(counts) >= 0
    assert sum(counts) == len(PROMPT)
    assert receipt.num_cached_tokens == min(num_cached, len(PROMPT))


def test_who_prefilled():
    assert receipt_of(usage_of(0, prefilled_locally=True)).to_json()["prefill_worker_id"] == "d"
    elsewhere = receipt_of(usage_of(0, prefill_worker_id="p", num_transferred_blocks=4, num_transferred_bytes=9))
    told = elsewhere.to_json()
    assert (told["prefill_worker_id"], told["prefilled_locally"]) == ("p", False)
    assert (told["handoff"], told["digests_checked"]) == ({"blocks": 4, "bytes": 9, "first_token_equal": None}, 4)


def test_stages_are_between_stamps_by_the_workers_clocks_where_they_have_them():
    stamps = [
        (3 + 1, 11.25),
        (6, 12.0),
        (7, 12.5),
        (9, 14.5),
        (11, 14.75),
        (12, 15.0),
        (13, 15.5),
        (14, 19.0),
        (99, 1.0),
    ]
    stages = receipt_of(usage_of(0), stamps).to_json()["stage_seconds"]
    assert stages == {
        "tokenize": 0.5,
        "admit_and_route": 0.5,
        "order": 0.25,
        "prefill_queue": 0.5,
        "prefill": 2.0,
        "handoff": 0.25,
        "join": 0.25,
        "decode": 3.5,
        "total": 10.0,
    }
    cut_short = receipt_of(usage_of(0), own=[(Event.FIRST_TOKEN, 12.0)])
    assert cut_short.to_json()["stage_seconds"] == {
        "tokenize": 0.5, "admit_and_route": 0.5, "decode": 8.0, "total": 10.0
    }  # fmt: skip
    behind = receipt_of(usage_of(0), [(4, 3.0)])
    assert behind.to_json()["stage_seconds"]["order"] == 0.0  # a clock behind ours


# ---- over HTTP ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def http(router):
    with httpx.Client(base_url=router.base_url, timeout=60) as client:
        yield client


FETCHED = usage_of(96, [("device", 1), ("disk", 1)], prefill_worker_id="p", num_transferred_blocks=4)
STAMPS = [(4, 1.0), (6, 2.0), (7, 2.5), (9, 4.0), (13, 5.0), (14, 8.0)]


def scripted(usage=FETCHED):
    return lambda request: Script([[300], [301], [302], [303]], usage=usage, stamps=STAMPS)


def only_receipt(answer) -> dict[str, object]:
    (receipt,) = answer["receipt"]["sequences"]
    return receipt


def check(receipt, worker) -> None:
    assert (receipt["decode_worker_id"], receipt["numerics"]) == (worker.worker_id, "paper/float32")
    assert (receipt["prefill_worker_id"], receipt["attempts"], receipt["recomputes"]) == ("p", 1, 0)
    assert (receipt["prompt_tokens"], receipt["completion_tokens"]) == (100, 4)
    assert (receipt["computed_tokens"], receipt["reused_tokens"], receipt["fetched_tokens"]) == (4, 32, 64)
    assert receipt["fetched"][1] == {
        "holder_id": "peer", "tier": "disk", "lane": "cma", "blocks": 1, "bytes": 1000, "seconds": 0.5
    }  # fmt: skip
    assert receipt["digests_checked"] == 6
    assert (receipt["stage_seconds"]["prefill"], receipt["stage_seconds"]["decode"]) == (1.5, 3.0)
    assert receipt["unix_seconds"]["received"] == 1.0


def test_a_receipt_comes_by_field_or_by_header_and_not_unasked(http, worker):
    worker.reply = scripted()
    body = {"prompt": PROMPT, "request_id": "bill"}
    for answer in (
        http.post("/v1/completions", json={**body, "receipt": True}).json(),
        http.post("/v1/completions", json=body, headers={"X-Tandem-Receipt": "1"}).json(),
    ):
        assert answer["receipt"]["request_id"] == "bill"
        check(only_receipt(answer), worker)
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 96}
    assert "receipt" not in http.post("/v1/completions", json=body).json()
    assert "receipt" not in http.post("/v1/completions", json=body, headers={"X-Tandem-Receipt": "0"}).json()
    refused = http.post("/v1/completions", json={**body, "receipt": "yes"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "receipt")


def test_chat_answers_carry_it_too(http, worker):
    worker.reply = scripted(usage_of(0))
    body = {"messages": [{"role": "user", "content": "hi"}], "receipt": True}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert only_receipt(answer)["prompt_tokens"] == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_a_stream_s_last_event_carries_it(http, worker, url, what, include_usage):
    worker.reply = scripted()
    body = {**what, "stream": True, "receipt": True, "stream_options": {"include_usage": include_usage}}
    *_, last, done = [line for line in http.post(url, json=body).text.split("\n\n") if line]
    assert done == "data: [DONE]"
    event = json.loads(last.removeprefix("data: "))
    assert event["choices"] == []
    assert ("usage" in event) == include_usage
    assert only_receipt(event)["completion_tokens"] == 4


def test_a_stop_string_does_not_lose_it_and_a_worker_that_says_nothing_gives_none(http, worker, tokenizer):
    tokens = tokenizer.encode(["Hello world! How are you today?"], False)[0]
    worker.reply = lambda request: Script([[token] for token in tokens], pb.FINISH_REASON_UNSPECIFIED, usage=FETCHED)
    body = {"prompt": PROMPT, "stop": "How", "receipt": True, "max_tokens": 100}
    receipt = only_receipt(http.post("/v1/completions", json=body).json())
    assert receipt["fetched_tokens"] == 64
    assert "prefill" not in receipt["stage_seconds"]
    assert receipt["stage_seconds"]["decode"] >= 0
    worker.reply = lambda request: Script([[token] for token in tokens], pb.FINISH_REASON_UNSPECIFIED)
    assert only_receipt(http.post("/v1/completions", json=body).json()) is None


FED_FROM_RECEIPTS = ("receipt", "cached", "fetched", "handoff", "digests", "recomputes")


def counters(http) -> Counter[str]:
    found: Counter[str] = Counter()
    for line in http.get("/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("tandem:router_") and "_total" in name:
            name = name.removeprefix("tandem:router_").replace("_total", "")
            if name.startswith(FED_FROM_RECEIPTS):
                found[name] += float(value)
    return found


def test_the_counters_are_the_sum_of_the_receipts(http, worker):
    """Random usages, plain, streamed, with several prompts and answers, and with a stop string among them."""
    rng = random.Random(3)

    def reply(request: pb.GenerateRequest) -> Script:
        fetched = [(rng.choice(TIERS), rng.randint(0, 2)) for _ in range(rng.randint(0, 3))]
        usage = usage_of(rng.randint(0, 100), fetched, num_recomputes=rng.randint(0, 1))
        usage.num_transferred_blocks, usage.num_transferred_bytes = rng.randint(0, 4), rng.randint(0, 10**6)
        return Script([[300], [301]], usage=usage)

    worker.reply = reply
    before, receipts, num_cached = counters(http), [], 0
    for stream, n, num_prompts, _ in itertools.product((False, True), (1, 2), (1, 2), range(3)):
        body = {"prompt": [PROMPT] * num_prompts, "n": n, "stream": stream, "receipt": True}
        answer = http.post(
            "/v1/completions", json={**body, "stream_options": {"include_usage": True}} if stream else body
        )
        if stream:
            told = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))
        else:
            told = answer.json()
        receipts += told["receipt"]["sequences"]
        firsts = told["receipt"]["sequences"][::n]  # a prompt counts once in OpenAI's usage
        assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == sum(
            receipt["reused_tokens"] + receipt["fetched_tokens"] for receipt in firsts
        )
        num_cached += sum(r["reused_tokens"] + r["fetched_tokens"] for r in told["receipt"]["sequences"])
    expected: Counter[str] = Counter()
    for receipt in receipts:
        expected["receipts"] += 1
        for source in ("computed", "reused", "fetched"):
            expected[f'receipt_prompt_tokens{{source="{source}"}}'] += receipt[f"{source}_tokens"]
        for part in receipt["fetched"]:
            expected[f'fetched_blocks{{tier="{part["tier"]}"}}'] += part["blocks"]
            expected[f'fetched_bytes{{tier="{part["tier"]}"}}'] += part["bytes"]
        expected["handoff_blocks"] += receipt["handoff"]["blocks"]
        expected["handoff_bytes"] += receipt["handoff"]["bytes"]
        expected["digests_checked"] += receipt["digests_checked"]
        expected["recomputes"] += receipt["recomputes"]
    expected["cached_tokens"] = num_cached
    grown = counters(http)
    grown.subtract(before)
    assert +grown == +expected


def test_request_times_come_from_the_stamps(http, worker):
    def sums() -> dict[str, float]:
        lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith("vllm:request_")]
        return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if "_sum{" in line}

    worker.reply = scripted()
    before = sums()
    http.post("/v1/completions", json={"prompt": PROMPT})
    after = sums()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["vllm:request_queue_time_seconds_sum"] == pytest.approx(0.5)
    assert grown["vllm:request_prefill_time_seconds_sum"] == pytest.approx(1.5)
    assert grown["vllm:request_decode_time_seconds_sum"] == pytest.approx(3.0)
    assert grown["vllm:request_time_per_output_token_seconds_sum"] == pytest.approx(1.0)
