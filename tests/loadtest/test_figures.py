"""Records become figures: what counts, and what does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.figures import Spread, read_result, summarize, timeline, write_result
from loadtest.figures.scrape import Sample, parse_facts, parse_gauges
from loadtest.plan import Outcome, RequestRecord, Slo, percentile
from loadtest.send.sse import BadStream, Chunk, parse_line
from tests.loadtest.factories import RECORD, records, result


def test_latencies_count_from_when_a_request_was_due() -> None:
    late = replace(RECORD, sent_s=1.4)
    assert (late.ttft_s, late.e2e_s, late.tpot_s) == (0.5, 1.0, 0.25)
    assert late.late_s == pytest.approx(0.4)


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    assert replace(RECORD, num_output_tokens=1, gaps_s=()).tpot_s is None


@given(
    st.builds(
        RequestRecord,
        index=st.integers(0),
        kind=st.text(),
        turn=st.integers(0),
        is_warmup=st.booleans(),
        scheduled_s=st.floats(0, 1e6),
        sent_s=st.floats(0, 1e6),
        finished_s=st.floats(0, 1e6),
        outcome=st.sampled_from(Outcome),
        error=st.text(),
        first_token_s=st.none() | st.floats(0, 1e6),
        gaps_s=st.lists(st.floats(0, 1e6), max_size=5).map(tuple),
        num_prompt_tokens=st.integers(0, 1 << 40),
        num_cached_tokens=st.integers(0, 1 << 40),
        num_output_tokens=st.integers(0, 1 << 40),
    )
)
def test_records_survive_the_way_through_a_message(record: RequestRecord) -> None:
    assert RequestRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


@pytest.mark.parametrize(
    "change", [{"gaps_s": "x"}, {"sent_s": "now"}, {"finished_s": float("nan")}, {"outcome": "fine"}, {"more": 1}]
)
def test_a_message_that_is_no_record_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no record|not a valid Outcome"):
        RequestRecord.from_dict(RECORD.to_dict() | change)


@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        ("ttft:500", True),
        ("ttft:499", False),
        ("tpot:250", True),
        ("tpot:249", False),
        ("itl_max:400", True),
        ("itl_max:399", False),
        ("itl:397", True),
        ("itl:396", False),
        ("e2el:1000 ttft:500", True),
        ("e2el:999,ttft:500", False),
    ],
)
def test_a_request_is_good_if_it_meets_all_objectives(text: str, is_good: bool) -> None:
    assert Slo.parse(text).is_met(RECORD) is is_good


def test_errors_and_refusals_are_never_good() -> None:
    slo = Slo.parse("e2el:1e9")
    assert not slo.is_met(replace(RECORD, outcome=Outcome.ERROR))
    assert not slo.is_met(replace(RECORD, outcome=Outcome.REFUSED))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_percentiles_lie_between_neighbours(values: list[float], share: float) -> None:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    assert low - 1e-6 <= percentile(ordered, share) <= high + 1e-6


def test_a_spread_of_nothing_is_nothing() -> None:
    assert Spread.of([None]) == Spread(None, None, None, None, None)


def test_warm_up_is_in_no_figure_and_late_sends_are_counted() -> None:
    made = records(10, 10.0, ttft_s=0.2)
    made[0] = replace(made[0], is_warmup=True, first_token_s=99.0, finished_s=100.0, outcome=Outcome.OK)
    made[5] = replace(made[5], sent_s=made[5].scheduled_s + 0.06)
    summary = summarize(result("a", 10.0, made))
    assert (summary.num_requests, summary.num_ok, summary.num_late, summary.num_lost) == (9, 9, 1, 0)
    assert summary.latest_send_s == pytest.approx(0.06)
    assert summary.ttft.p99 == pytest.approx(0.2)
    assert summary.goodput == pytest.approx(10.0)
    assert summary.offered_rate == pytest.approx(10.0)
    assert summary.duration_s == pytest.approx(0.8 + 0.4), "from the first request due to the last token"
    assert summary.output_token_rate == pytest.approx(45 / 1.2)
    assert [(each.kind, each.num_requests) for each in summary.classes] == [("short", 5), ("long", 4)]


def test_requests_without_a_record_lower_the_goodput() -> None:
    run = replace(result("a", 10.0, records(10, 10.0, 0.2)), num_planned=20)
    summary = summarize(run)
    assert summary.num_lost == 10
    assert summary.good == 0.5


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    run = result("a", 10.0, records(4, 10.0, 0.2))
    write_result(tmp_path / "folder" / "run.json", run, summarize(run).to_json())
    assert read_result(tmp_path / "folder" / "run.json") == run


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 1}', '{"schema": 2}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        read_result(tmp_path / "run.json")


def test_a_request_s_itl_is_the_99th_percentile_of_its_own_gaps() -> None:
    """Of 127 gaps one stall is forgiven, two are not."""
    stalled = (0.01,) * 126 + (1.0,)
    once, twice = replace(RECORD, gaps_s=stalled), replace(RECORD, gaps_s=(*stalled[1:], 1.0))
    assert once.itl_s == pytest.approx(0.01)
    assert twice.itl_s == pytest.approx(0.01 + 0.74 * 0.99)
    assert replace(RECORD, gaps_s=()).itl_s is None


def test_timelines_add_up() -> None:
    made = records(10, 10.0, ttft_s=0.5)
    tokens = timeline.tokens_per_second(made, 0.5)
    assert sum(rate * 0.5 for _, rate in tokens) == pytest.approx(50)
    assert max(number for _, number in timeline.in_flight(made, 0.1)) == 7
    samples = [
        Sample(0.1, "decode-0", 1, 2, 0.3), Sample(0.2, "decode-1", 1, 3, 0.4), Sample(0.3, "prefill-0", 0, 4, 0.9),
        Sample(1.1, "decode-0", 1, None, None),
    ]  # fmt: skip
    assert timeline.waiting(samples, 1.0) == ((0.5, 9.0),)
    assert timeline.kv_usage(samples, "decode", 1.0) == ((0.5, 0.4),)
    assert timeline.kv_usage(samples, "", 1.0) == ((0.5, 0.9),)


def test_gauges_of_several_series_are_added_and_usage_is_the_largest() -> None:
    page = (
        "# HELP vllm:num_requests_running x\n"
        'vllm:num_requests_running{engine="0",model_name="m"} 2.0\nvllm:num_requests_running{engine="1"} 3\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:kv_cache_usage_perc{engine="1"} 7.5e-01\n'
        "vllm:num_requests_waiting 1.0\nvllm:num_requests_waiting_by_reason 9.0\n"
    )
    assert parse_gauges(page) == {"running": 5.0, "waiting": 1.0, "kv_usage": 0.75}
    assert parse_gauges("") == {}


def test_a_server_says_what_it_computes_with_and_which_lanes_blocks_took() -> None:
    decode = (
        'tandem:compute_info{device="cpu",kernels="amx",model_name="m",quantization="none"} 1.0\n'
        'vllm:cache_config_info{block_size="32",cache_dtype="bfloat16"} 1.0\n'
        'tandem:transfer_bytes_total{lane="cma",outcome="ok"} 5e+06\n'
        'tandem:transfer_bytes_total{lane="tcp",outcome="ok"} 0.0\n'
    )
    prefill = 'tandem:compute_info{device="cpu",kernels="avx512",quantization="none"} 1.0\n'
    assert parse_facts([decode, prefill, ""]) == {
        "device": "cpu", "kernels": "amx, avx512", "quantization": "none", "dtype of keys and values": "bfloat16",
        "lane": "cma",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "chunk"),
    [
        (b"\n", None),
        (b": keep-alive\n", None),
        (b"event: x\n", None),
        (b"data: [DONE]\n", Chunk(is_done=True)),
        (b'data: {"choices": [{"text": " a", "finish_reason": null}]}\r\n', Chunk(has_tokens=True)),
        (b'data: {"choices": [{"text": "", "finish_reason": null}]}\n', Chunk(has_tokens=True)),
        (b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n', Chunk()),
        (b'data: {"choices": [{"text": "", "finish_reason": "stop", "token_ids": [5]}]}\n', Chunk(has_tokens=True)),
        (b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n', Chunk()),
        (b'data:{"choices": [{"delta": {"content": "x"}}]}\n', Chunk(has_tokens=True)),
        (b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n', Chunk(usage={"completion_tokens": 2})),
        (b'data: {"error": {"message": "no room"}}\n', Chunk(error="no room")),
    ],
)
def test_lines_of_a_stream_are_understood(line: bytes, chunk: Chunk | None) -> None:
    assert parse_line(line) == chunk


@pytest.mark.parametrize("line", [b"data: {\n", b"data: 5\n"])
def test_a_line_that_is_no_chunk_is_refused(line: bytes) -> None:
    with pytest.raises(BadStream):
        parse_line(line)
