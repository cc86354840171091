"""The comparison with another engine, without one: the process that is asked, the columns, the ratios."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.bench.bench_engine import DECODE, PREFILL, Rows, decode_name, prefill_batches, prefill_name
from tests.bench.bench_peer import AVX2_TARGETS, TARGETS, Target, main, ratio_table
from tests.bench.step_process import StepProcess, StepProcessFailed
from tests.bench.vllm_peer import VllmColumn
from tests.compat import vllm_bench
from tests.compat.tool import ToolFailed

_TIMEOUT_S = 30.0
# Answers each order with the order itself; some orders make it misbehave.
_STUB = """
import argparse, json, os, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--answers", type=int)
print("noise on standard output", flush=True)
with open(parser.parse_args().answers, "w") as answers:
    for line in sys.stdin:
        order = json.loads(line)
        if order["order"] == "die":
            sys.exit("it died of this")
        if order["order"] == "sleep":
            time.sleep(600)
        print(json.dumps({"asked": order}), file=answers, flush=True)
"""

Start = Callable[[], StepProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    script = tmp_path / "stub.py"
    script.write_text(_STUB)
    processes: list[StepProcess] = []

    def start_one() -> StepProcess:
        processes.append(StepProcess([sys.executable, str(script)], os.environ, tmp_path / "logs" / "stub.log"))
        return processes[-1]

    yield start_one
    for process in processes:
        process.close()


def test_a_process_answers_orders_and_what_it_prints_goes_to_the_log(start: Start, tmp_path: Path) -> None:
    process = start()
    long = list(range(100_000))  # more than a pipe holds
    for token_ids in (long, [1]):
        answer = process.ask("prefill", _TIMEOUT_S, token_ids=token_ids)
        assert answer["asked"] == {"order": "prefill", "token_ids": token_ids}
    assert (tmp_path / "logs" / "stub.log").read_text() == "noise on standard output\n"


def test_a_process_that_dies_is_an_error_with_the_end_of_its_log(start: Start) -> None:
    process = start()
    with pytest.raises(StepProcessFailed, match=r"ended instead of answering \(die\)") as failure:
        process.ask("die", _TIMEOUT_S)
    assert str(failure.value).endswith("noise on standard output\nit died of this\n")


def test_a_process_that_does_not_answer_is_an_error_and_leaves_nothing_behind(start: Start) -> None:
    process = start()
    process.ask("step", _TIMEOUT_S)
    with pytest.raises(StepProcessFailed, match=r"did not sleep within 0\.1 s"):
        process.ask("sleep", 0.1)
    process.close(grace_s=0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_process_ends_when_its_input_does(start: Start) -> None:
    with start() as process:
        process.ask("step", _TIMEOUT_S)
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_vllm_is_sent_our_shapes_and_prompts_and_its_whole_steps_are_a_column() -> None:
    orders: list[dict[str, object]] = []

    class Recorder:
        def ask(self, order: str, timeout_s: float, **arguments: object) -> dict[str, object]:
            orders.append({"order": order, **arguments})
            return {"model_s": 0.25, "step_s": 0.5}

    column = VllmColumn(cast(StepProcess, Recorder()), vocab_size=1000)
    for run, whole in (
        (column.decode(8, 64), column.whole.decode(8, 64)),
        (column.prefill(700), column.whole.prefill(700)),
    ):
        assert (run(), whole()) == (0.25, 0.5)
    prompt = [token_id for batch in prefill_batches(700, 1000) for token_id in batch.token_ids.tolist()]
    assert len(prompt) == 700
    assert orders == [
        {"order": "decode", "num_sequences": 8, "context": 64},
        {"order": "step"},
        {"order": "prefill", "token_ids": prompt},
    ]


def test_an_environment_that_cannot_be_made_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(torch_index: str) -> None:
        raise ToolFailed(f"no index at {torch_index}")

    monkeypatch.setattr(vllm_bench, "install", fail)
    monkeypatch.setattr(sys, "argv", ["bench_peer", "--torch-index", "nowhere"])
    with pytest.raises(SystemExit, match=r"vLLM cannot be installed.*no index at nowhere"):
        main()


def test_rows_are_chosen_by_name() -> None:
    assert Rows.select(False, "") == Rows(DECODE, list(PREFILL))
    assert Rows.select(False, "").num_tokens == 32 * 4096
    assert Rows.select(False, "B = 8, ") == Rows([(8, 64), (8, 1024), (8, 4096)], [])
    assert Rows.select(True, "tokens") == Rows([], [256, 2048])
    with pytest.raises(SystemExit, match="no row is named like '4,096'"):
        Rows.select(True, "4,096")


def test_every_target_has_a_row() -> None:
    names = {decode_name(*shape) for shape in DECODE} | {prefill_name(length) for length in PREFILL}
    assert {target.row for target in (*TARGETS, *AVX2_TARGETS)} <= names


def test_ratios_are_of_time_in_decode_and_of_rate_in_prefill() -> None:
    table = ratio_table(
        {"B = 1": [0.6, 0.3, 9.0, 1.0], "B = 2": [1.4, 0.4, 9.0, 2.0]},
        {"256 tokens": [0.5, 0.25, 9.0, 1.0], "512 tokens": [0.8, 0.4, 9.0, 1.0]},
        [
            Target("B = 1", 0, 0.62), Target("B = 2", 0, 0.62), Target("B = 2", 1, 0.2),
            Target("256 tokens", 0, 1.8), Target("512 tokens", 0, 1.8),
        ],
    )  # fmt: skip
    assert table.splitlines()[2:] == [
        "| B = 1: time | 0.60 | ≤ 0.62: met | 0.30 |  |",
        "| B = 2: time | 0.70 | ≤ 0.62: missed | 0.20 | ≤ 0.20: met |",
        "| 256 tokens: tokens/s | 2.00 | ≥ 1.80: met | 4.00 |  |",
        "| 512 tokens: tokens/s | 1.25 | ≥ 1.80: missed | 2.50 |  |",
    ]


def test_the_peer_is_its_fastest_column_of_a_row_and_never_its_whole_engine() -> None:
    table = ratio_table(
        {"B = 1": [0.6, 0.3, 9.0, 1.2, 0.1, 1.0, 0.1]}, {"256 tokens": [0.5, 0.25, 9.0, 1.0, 0.1, 2.0, 0.1]}, []
    )
    assert table.splitlines()[2:] == [
        "| B = 1: time | 0.60 |  | 0.30 |  |",
        "| 256 tokens: tokens/s | 2.00 |  | 4.00 |  |",
    ]
