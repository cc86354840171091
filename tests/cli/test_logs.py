"""Logs: one record is one line, for people and for machines, and the launcher's progress lines."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from services.logs import (
    configure_logging,
    parse_phase,
    parse_ready,
    report_phase,
    report_ready,
    request_scope,
)


@pytest.fixture(autouse=True)
def _restore_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def logged(format: str, level: str = "info") -> tuple[logging.Logger, io.StringIO]:
    stream = io.StringIO()
    configure_logging(level, format, fields={"worker_id": "decode-0"}, stream=stream)
    return logging.getLogger("tests.logs"), stream


def test_json_lines_carry_message_fields_and_extras() -> None:
    log, stream = logged("json")
    log.info("read %d blocks", 3, extra={"request_id": "r1", "num_blocks": 3})
    entry = json.loads(stream.getvalue())
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "info",
        "logger": "tests.logs",
        "message": "read 3 blocks",
        "worker_id": "decode-0",
        "request_id": "r1",
        "num_blocks": 3,
    }


async def test_lines_name_the_request_that_they_are_about() -> None:
    log, stream = logged("json")

    async def work(name: str) -> None:
        await asyncio.sleep(0)
        log.info(name)

    with request_scope("r1"):
        begun_within = asyncio.create_task(work("within"))
        log.info("of another", extra={"request_id": "r2"})
    await asyncio.gather(begun_within, work("without"))
    entries = {entry["message"]: entry.get("request_id") for entry in map(json.loads, stream.getvalue().splitlines())}
    assert entries == {"of another": "r2", "within": "r1", "without": None}


def test_json_lines_carry_the_exception() -> None:
    log, stream = logged("json")
    try:
        raise ValueError("boom")
    except ValueError:
        log.exception("failed")
    assert "ValueError: boom" in json.loads(stream.getvalue())["exception"]


def test_auto_is_json_where_there_is_no_terminal() -> None:
    log, stream = logged("auto")
    log.info("hello")
    assert json.loads(stream.getvalue())["message"] == "hello"


def test_text_shows_extras_behind_the_message() -> None:
    log, stream = logged("text")
    log.warning("late", extra={"request_id": "r1"})
    assert stream.getvalue().endswith("WARNING tests.logs: late  request_id=r1\n")


def test_a_line_break_in_a_message_cannot_forge_a_record() -> None:
    log, stream = logged("text")
    log.info("prompt %s", "a\n12:00:00.000 ERROR forged: b", extra={"user": "x\ny"})
    assert stream.getvalue().count("\n") == 1


def test_level_drops_what_is_below_it() -> None:
    log, stream = logged("text", level="warning")
    log.info("hidden")
    assert stream.getvalue() == ""


def test_a_text_log_tells_of_single_requests_only_when_they_fail_or_at_debug() -> None:
    for format, level, shown in (("text", "info", 2), ("text", "debug", 4), ("json", "info", 4)):
        log, stream = logged(format, level)
        with request_scope("r1"):
            log.info("served")
            log.warning("failed")
        log.info("served", extra={"request_id": "r2"})
        log.info("of no request")
        assert len(stream.getvalue().splitlines()) == shown, (format, level)


def test_phases_are_reported_to_a_launcher_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TANDEM_LAUNCHER", raising=False)
    report_phase("importing")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TANDEM_LAUNCHER", "1")
    report_phase("importing")
    report_phase("weights\n", 0.5)
    report_ready(grpc="127.0.0.1:1")
    importing, weights, ready = capsys.readouterr().err.splitlines()
    assert parse_phase(importing) == ("importing", None)
    assert parse_phase(weights) == ("weights\\n", 0.5)
    assert parse_ready(ready) == {"grpc": "127.0.0.1:1"}


def test_other_lines_are_neither_phase_nor_ready() -> None:
    for line in (
        "hello",
        "TANDEM-PHASE",
        "TANDEM-PHASE x y",
        "TANDEM-PHASE -",
        "TANDEM-READY [",
        "TANDEM-READY []",
        "",
    ):
        assert parse_phase(line) is None
        assert parse_ready(line) is None
