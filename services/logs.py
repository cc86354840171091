"""Logs text for people and JSON lines for machines, and tells the launcher how far a process is.

Every process calls `configure_logging` once, in `main()`. Code logs through `logging.getLogger(__name__)` and hands
facts over by `extra=`. What is logged within `request_scope(id)`, and in tasks begun there, names the request by
itself. Never log a prompt's text or tokens, an answer's, or a key: an error's message may quote them, so its code is
logged instead. Standard library only.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("auto", "text", "json")
LAUNCHER_VARIABLE = "TANDEM_LAUNCHER"
"""Set to 1 in the processes that `tandem up` starts: then, and only then, they report how far they are."""

_PHASE_MARK = "TANDEM-PHASE"
_READY_MARK = "TANDEM-READY"
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
_COLORS = {
    logging.DEBUG: "\x1b[2m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[31m",
}


def configure_logging(
    level: str = "info",
    format: str = "auto",
    *,
    fields: Mapping[str, object] | None = None,
    shown: Mapping[str, object] | None = None,
    stream: TextIO | None = None,
) -> None:
    """Sends the logs of the whole process to `stream` (standard error).

    `format` is one of LOG_FORMATS; `auto` is text on a terminal and JSON lines elsewhere. `fields`, such as the
    worker_id, go into every JSON line, those of `shown` into every line. What each single request did stands in JSON
    lines, and in text at level debug. Calling it again replaces what it set up before.
    """
    stream = stream or sys.stderr
    on_terminal = stream.isatty()
    handler = logging.StreamHandler(stream)
    if format == "json" or (format == "auto" and not on_terminal):
        handler.setFormatter(JsonFormatter({**(fields or {}), **(shown or {})}))
    else:
        handler.setFormatter(TextFormatter(on_terminal and "NO_COLOR" not in os.environ, shown))
        if level.upper() == "INFO":
            handler.addFilter(_is_for_people)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)


def _is_for_people(record: logging.LogRecord) -> bool:
    """Whether a text log at level info shows it: at a thousand requests a second, nobody reads a line of each."""
    return record.levelno > logging.INFO or "request_id" not in extra_fields(record)


@contextmanager
def request_scope(request_id: str) -> Iterator[None]:
    """Log with the request's id within, and in tasks that are begun within."""
    token = _REQUEST_ID.set(request_id)
    try:
        yield
    finally:
        _REQUEST_ID.reset(token)


def current_request_id() -> str:
    """The request whose `request_scope` we are in; empty outside of any."""
    return _REQUEST_ID.get()


def extra_fields(record: logging.LogRecord) -> dict[str, object]:
    """Return what the caller passed as `extra=`, and the request's id. Called where the record was made."""
    fields = {name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS}
    request_id = _REQUEST_ID.get()
    return {"request_id": request_id, **fields} if request_id else fields


class TextFormatter(logging.Formatter):
    """`14:03:07.123 INFO services.engine: message  request_id=…`"""

    def __init__(self, colored: bool = False, fields: Mapping[str, object] | None = None) -> None:
        super().__init__()
        self._colored = colored
        self._fields = dict(fields or {})

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extras = "".join(f"  {name}={value}" for name, value in {**self._fields, **extra_fields(record)}.items())
        # One record, one line, whatever a client's text contains: a line break in it must not forge a record.
        message = _one_line(record.getMessage())
        line = f"{clock}.{int(record.msecs):03d} {record.levelname} {record.name}: {message}{_one_line(extras)}"
        if self._colored and record.levelno in _COLORS:
            line = f"{_COLORS[record.levelno]}{line}\x1b[0m"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        if record.stack_info:
            line += "\n" + self.formatStack(record.stack_info)
        return line


def _one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, the fixed fields, the extra ones, exception."""

    def __init__(self, fields: Mapping[str, object] | None = None) -> None:
        super().__init__()
        self._fields = dict(fields or {})

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": utc_time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in {**self._fields, **extra_fields(record)}.items():
            entry.setdefault(name, value)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = self.formatStack(record.stack_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


def utc_time(unix_s: float) -> str:
    """`2026-01-31T14:03:07.123Z`, as JSON lines have it."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))
    return f"{seconds}.{int(unix_s % 1 * 1000):03d}Z"


# ---- to the launcher --------------------------------------------------------


def launched() -> bool:
    """Whether `tandem up` started this process."""
    return os.environ.get(LAUNCHER_VARIABLE) == "1"


def detail_level() -> int:
    """The level of what `tandem up` shows in its own way: where a process listens, how it starts, how fast it is."""
    return logging.DEBUG if launched() else logging.INFO


def report_phase(phase: str, fraction: float | None = None) -> None:
    """Tells the launcher, if there is one, what part of its start this process is in, and how much of it is done."""
    done = "-" if fraction is None else f"{min(max(fraction, 0.0), 1.0):.3f}"
    _report(f"{_PHASE_MARK} {done} {_one_line(phase)}")


def report_ready(**facts: object) -> None:
    """Tells the launcher, if there is one, that this process serves; `facts` such as its addresses go along."""
    _report(f"{_READY_MARK} {json.dumps(facts, default=str)}")


def _report(line: str) -> None:
    if launched():
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def parse_phase(line: str) -> tuple[str, float | None] | None:
    """`(phase, fraction)` if the line comes from `report_phase`."""
    mark, _, rest = line.partition(" ")
    number, _, phase = rest.partition(" ")
    if mark != _PHASE_MARK or not phase:
        return None
    try:
        return phase, None if number == "-" else min(max(float(number), 0.0), 1.0)
    except ValueError:
        return None


def parse_ready(line: str) -> dict[str, object] | None:
    """The facts if the line comes from `report_ready`."""
    mark, _, rest = line.partition(" ")
    if mark != _READY_MARK:
        return None
    try:
        facts = json.loads(rest or "{}")
    except ValueError:
        return None
    return facts if isinstance(facts, dict) else None
