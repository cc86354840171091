"""What `tandem up` shows while it runs."""

from __future__ import annotations

import io
import json

from services.cli.up.console import (
    READY,
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


def test_plain_phases_are_lines_with_progress_in_quarters() -> None:
    stream = io.StringIO()
    shown = PlainDisplay(["p"], stream)
    shown.phase("p", "importing")
    for fraction in (0.0, 0.1, 0.26, 0.3, 0.8, 1.0):
        shown.phase("p", "weights", fraction)
    shown.phase("p", READY, about="fast")
    assert stream.getvalue().splitlines() == [
        "p | importing",
        "p | weights",
        "p | weights: 25 %",
        "p | weights: 75 %",
        "p | weights: 100 %",
        "p | ready: fast",
    ]


def test_json_display_gives_objects_only_and_says_whose() -> None:
    stream = io.StringIO()
    shown = make_display(["p"], json_lines=True, stream=stream)
    assert isinstance(shown, JsonDisplay)
    shown.line("p", '{"level": "info", "message": "loaded"}')
    shown.line("p", "Traceback: é")
    shown.line("p", "[1]")
    shown.phase("p", "weights", 0.5)
    shown.phase("p", "ready", about="fast")
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert all(entry.pop("time").endswith("Z") and entry.pop("level") == "info" for entry in entries[1:])
    assert entries == [
        {"process": "p", "level": "info", "message": "loaded"},
        {"process": "p", "message": "Traceback: é"},
        {"process": "p", "message": "[1]"},
        {"process": "p", "message": "weights", "progress": 0.5},
        {"process": "p", "message": "ready", "about": "fast"},
    ]


def test_terminal_display_keeps_text_as_it_is_and_lets_no_row_live_after_the_start() -> None:
    stream = io.StringIO()
    shown = TerminalDisplay(["p"], stream)
    shown.phase("p", "weights", 0.5)
    shown.line("p", "[bold]not markup[/bold]")
    shown.phase("p", READY)
    shown.settled()
    for _ in range(3):
        shown.phase("p", "weights", 0.1)
    assert stream.getvalue().count("weights") == 1
    shown.phase("p", READY, about="again")
    assert "[bold]not markup[/bold]" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("p | ready: again")
