"""Shows what `tandem up` does: how far each process is with its start, and one log stream with a prefix per process.

Logs go to standard error; standard output gets the URL alone, when there is something to ask.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TextIO

from services.logs import utc_time

if TYPE_CHECKING:
    from rich.text import Text

_PHASE_WIDTH = len("waiting for workers")
READY = "ready"
"""The last phase of a start."""
_COLORS = (36, 35, 33, 32, 34, 96, 95, 93, 92, 94)  # not red: that is for errors


class Display(Protocol):
    """Takes what the supervised processes and the launcher say."""

    def line(self, name: str, text: str) -> None:
        """A line of a process's output, or of the launcher's own."""

    def phase(self, name: str, phase: str, fraction: float | None = None, about: str = "") -> None:
        """The process is in this phase of its start, and has done `fraction` (0 to 1) of it; `about` says more."""

    def settled(self) -> None:
        """The start is over, well or not: what comes are lines."""


def make_display(names: Sequence[str], json_lines: bool, stream: TextIO) -> Display:
    """The display for these processes: JSON lines, a terminal's, or plain text."""
    if json_lines:
        return JsonDisplay(stream)
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return TerminalDisplay(names, stream)
    return PlainDisplay(names, stream)


class WhileRead:
    """Shows until nobody reads any more (the terminal is closed, the pipe's other end has gone), and then nothing.

    What runs must go on and, above all, still stop when it is told to.
    """

    def __init__(self, shown: Display) -> None:
        self._shown: Display | None = shown

    def line(self, name: str, text: str) -> None:
        self._show(lambda shown: shown.line(name, text))

    def phase(self, name: str, phase: str, fraction: float | None = None, about: str = "") -> None:
        self._show(lambda shown: shown.phase(name, phase, fraction, about))

    def settled(self) -> None:
        self._show(lambda shown: shown.settled())

    def _show(self, show: Callable[[Display], None]) -> None:
        if self._shown is None:
            return
        try:
            show(self._shown)
        except OSError:  # EPIPE of a pipe, EIO of a terminal
            self._shown = None


class _Steps:
    """Words phases as lines: one per phase, and one per quarter of it."""

    def __init__(self) -> None:
        self._shown: dict[str, tuple[str, int]] = {}  # by process: its phase and the quarters of it that were shown

    def next(self, name: str, phase: str, fraction: float | None, about: str) -> str:
        """The line; empty where the last one says it already."""
        quarter = int((fraction or 0) * 4)
        if self._shown.get(name) == (phase, quarter):
            return ""
        self._shown[name] = phase, quarter
        return phase + (f": {quarter * 25} %" if quarter else "") + (f": {about}" if about else "")


class PlainDisplay:
    """`prefill-0 | …`"""

    def __init__(self, names: Sequence[str], stream: TextIO) -> None:
        self._width = max((len(name) for name in names), default=0)
        self._stream = stream
        self._steps = _Steps()

    def line(self, name: str, text: str) -> None:
        self._stream.write(f"{name:<{self._width}} | {text}\n")
        self._stream.flush()

    def phase(self, name: str, phase: str, fraction: float | None = None, about: str = "") -> None:
        if text := self._steps.next(name, phase, fraction, about):
            self.line(name, text)

    def settled(self) -> None:
        """Nothing to take down."""


class JsonDisplay:
    """Writes one JSON object per line, the processes' own with `process` added."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def line(self, name: str, text: str) -> None:
        try:
            entry = json.loads(text)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            entry = self._own() | {"message": text}
        self._write({"process": name} | entry)

    def phase(self, name: str, phase: str, fraction: float | None = None, about: str = "") -> None:
        entry = {"process": name} | self._own() | {"message": phase}
        if fraction is not None:
            entry["progress"] = fraction
        if about:
            entry["about"] = about
        self._write(entry)

    def settled(self) -> None:
        """Nothing to take down."""

    def _own(self) -> dict[str, object]:
        """What the lines of processes have by themselves."""
        return {"time": utc_time(time.time()), "level": "info"}

    def _write(self, entry: dict[str, object]) -> None:
        self._stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._stream.flush()


@dataclass
class _Row:
    """How far one process is. `since_s`, `ended_s`: when its start began and, once it serves, ended."""

    phase: str = "starting"
    fraction: float | None = None
    about: str = ""
    since_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None

    @property
    def seconds(self) -> float:
        return (time.monotonic() if self.ended_s is None else self.ended_s) - self.since_s


class TerminalDisplay:
    """Lines with coloured prefixes and, below them, a table that lives: one row for each process that starts."""

    def __init__(self, names: Sequence[str], stream: TextIO) -> None:
        # Here and not above: a plain log must not cost the import.
        from rich.console import Console
        from rich.live import Live

        self._width = max((len(name) for name in names), default=0)
        self._colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}
        self._console = Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        self._rows: dict[str, _Row] = {}
        self._live = Live(
            get_renderable=self._table, console=self._console, redirect_stdout=False, redirect_stderr=False
        )
        self._settled = False
        self._steps = _Steps()  # of those that start again

    def line(self, name: str, text: str) -> None:
        from rich.text import Text

        self._console.print(Text.from_ansi(self._prefix(name, " | ") + text))

    def phase(self, name: str, phase: str, fraction: float | None = None, about: str = "") -> None:
        if self._settled:
            if text := self._steps.next(name, phase, fraction, about):
                self.line(name, text)
            return
        row = self._rows.setdefault(name, _Row())
        row.phase, row.fraction, row.about = phase, fraction, about or row.about
        row.ended_s = time.monotonic() if phase == READY else None
        self._live.start(refresh=True)

    def settled(self) -> None:
        """Leaves the table as it stands."""
        self._settled = True
        self._live.stop()

    def _prefix(self, name: str, separator: str) -> str:
        text = f"{name:<{self._width}}{separator}"
        return text if "NO_COLOR" in os.environ else f"\x1b[{self._colors.get(name, 0)}m{text}\x1b[0m"

    def _table(self) -> Text:
        from rich.text import Text

        rows = []
        for name, row in self._rows.items():
            done = "" if row.fraction is None else f"{row.fraction:.0%}"
            facts = f"{row.phase:<{_PHASE_WIDTH}} {done:>4}  {row.seconds:5.1f} s  {row.about}"
            rows.append(Text.from_ansi(self._prefix(name, " | ") + facts))
        return Text("\n", no_wrap=True, overflow="ellipsis").join(rows)
