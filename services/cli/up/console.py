"""Shows what `tandem up` does: one log stream with a prefix per process, and the loading of models.

Logs go to standard error; standard output gets the URL alone, when there is something to ask.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO

_COLORS = (36, 35, 33, 32, 34, 96, 95, 93, 92, 94)  # not red: that is for errors


class Display(Protocol):
    """Takes the supervised processes' output."""

    def line(self, name: str, text: str) -> None:
        """A line of a process's output, or of the launcher's own."""

    def progress(self, name: str, fraction: float, what: str) -> None:
        """The process has done `fraction` (0 to 1) of its start."""

    def ready(self, name: str) -> None:
        """The process serves."""

    def settled(self) -> None:
        """All processes serve, or the start has failed: no progress from here on."""


def make_display(names: Sequence[str], json_lines: bool, stream: TextIO = sys.stderr) -> Display:
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

    def progress(self, name: str, fraction: float, what: str) -> None:
        self._show(lambda shown: shown.progress(name, fraction, what))

    def ready(self, name: str) -> None:
        self._show(lambda shown: shown.ready(name))

    def settled(self) -> None:
        self._show(lambda shown: shown.settled())

    def _show(self, show: Callable[[Display], None]) -> None:
        if self._shown is None:
            return
        try:
            show(self._shown)
        except OSError:  # EPIPE of a pipe, EIO of a terminal
            self._shown = None


class PlainDisplay:
    """`prefill-0 | …`; progress in quarters."""

    def __init__(self, names: Sequence[str], stream: TextIO) -> None:
        self._width = max((len(name) for name in names), default=0)
        self._stream = stream
        self._quarters: dict[str, int] = {}

    def line(self, name: str, text: str) -> None:
        self._stream.write(f"{name:<{self._width}} | {text}\n")
        self._stream.flush()

    def progress(self, name: str, fraction: float, what: str) -> None:
        quarter = int(fraction * 4)
        if quarter > self._quarters.get(name, 0):
            self._quarters[name] = quarter
            self.line(name, f"{what}: {quarter * 25} %")

    def ready(self, name: str) -> None:
        self._quarters.pop(name, None)
        self.line(name, "ready")

    def settled(self) -> None:
        self._quarters.clear()


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
            entry = {"message": text}
        self._write({"process": name} | entry)

    def progress(self, name: str, fraction: float, what: str) -> None:
        self._write({"process": name, "message": what, "progress": fraction})

    def ready(self, name: str) -> None:
        self._write({"process": name, "message": "ready"})

    def settled(self) -> None:
        """Nothing to take down."""

    def _write(self, entry: dict[str, object]) -> None:
        self._stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._stream.flush()


class TerminalDisplay:
    """Coloured prefixes, and below them a progress bar for each process until it serves."""

    def __init__(self, names: Sequence[str], stream: TextIO) -> None:
        # Here and not above: a plain log must not cost the import.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

        self._width = max((len(name) for name in names), default=0)
        self._colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}
        self._console = Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.fields[process]}"),
            BarColumn(),
            TextColumn("{task.fields[what]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._settled = False

    def line(self, name: str, text: str) -> None:
        from rich.text import Text

        prefix = f"{name:<{self._width}} | "
        if "NO_COLOR" not in os.environ:
            prefix = f"\x1b[{self._colors.get(name, 0)}m{prefix}\x1b[0m"
        self._console.print(Text.from_ansi(prefix + text))

    def progress(self, name: str, fraction: float, what: str) -> None:
        if self._settled:
            return
        if name not in self._tasks:
            self._bars.start()
            self._tasks[name] = self._bars.add_task("", total=1.0, process=f"{name:<{self._width}}", what=what)
        self._bars.update(self._tasks[name], completed=fraction, what=what)

    def ready(self, name: str) -> None:
        if name in self._tasks and not self._settled:
            self._bars.update(self._tasks[name], completed=1.0, what="ready")
        else:
            self.line(name, "ready")

    def settled(self) -> None:
        self._settled = True
        self._bars.stop()
