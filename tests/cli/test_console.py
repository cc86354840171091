"""What `tandem up` shows while it runs."""

from __future__ import annotations

import io
import json

from services.cli.up.console import (
    JsonDisplay,
    PlainDisplay,
    TerminalDisplay,
    make_display,
)


def test_plain_lines_have_aligned_prefixes() -> None:
    stream = io.StringIO()
    shown = make_display(["router", "prefill-0"], json_lines=False, stream=stream)
    assert isinstance(shown, PlainDisplay)
    shown.line("router", "hello")
    shown.line("prefill-0", "hello")
    assert stream.getvalue() == "router    | hello\nprefill-0 | hello\n"


def test_plain_progress_comes_in_quarters() -> None:
    stream = io.StringIO()
    shown = PlainDisplay(["p"], stream)
    for fraction in (0.0, 0.1, 0.26, 0.3, 0.8, 1.0):
        shown.progress("p", fraction, "weights")
    shown.ready("p")
    assert stream.getvalue().splitlines() == [
        "p | weights: 25 %",
        "p | weights: 75 %",
        "p | weights: 100 %",
        "p | ready",
    ]


def test_json_display_gives_objects_only_and_says_whose() -> None:
    stream = io.StringIO()
    shown = make_display(["p"], json_lines=True, stream=stream)
    assert isinstance(shown, JsonDisplay)
    shown.line("p", '{"level": "info", "message": "loaded"}')
    shown.line("p", "Traceback: é")
    shown.line("p", "[1]")
    shown.progress("p", 0.5, "weights")
    shown.ready("p")
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [
        {"process": "p", "level": "info", "message": "loaded"},
        {"process": "p", "message": "Traceback: é"},
        {"process": "p", "message": "[1]"},
        {"process": "p", "message": "weights", "progress": 0.5},
        {"process": "p", "message": "ready"},
    ]


def test_terminal_display_keeps_text_as_it_is_and_takes_its_bars_down() -> None:
    stream = io.StringIO()
    shown = TerminalDisplay(["p"], stream)
    shown.progress("p", 0.5, "weights")
    shown.line("p", "[bold]not markup[/bold]")
    shown.ready("p")
    shown.settled()
    shown.progress("p", 0.6, "late")
    shown.ready("p")
    assert "[bold]not markup[/bold]" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("p | ready")
