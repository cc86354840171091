"""Defines a finding of `tandem doctor`: a verdict on one thing, and the remedy where there is one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

_SHIM = str(Path(__file__).parents[1] / "up" / "forks" / "child.py")  # who is killed with us
_PROBE_TIMEOUT_S = 60.0


class Verdict(Enum):
    """GOOD; WORSE: serves, but slower or with less; BROKEN: will not serve."""

    GOOD = "✓"
    WORSE = "!"
    BROKEN = "✗"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    verdict: Verdict
    subject: str
    detail: str
    remedy: str = ""


def good(subject: str, detail: str) -> Finding:
    return Finding(Verdict.GOOD, subject, detail)


def worse(subject: str, detail: str, remedy: str) -> Finding:
    return Finding(Verdict.WORSE, subject, detail, remedy)


def broken(subject: str, detail: str, remedy: str) -> Finding:
    return Finding(Verdict.BROKEN, subject, detail, remedy)


def refused(subject: str, error: Exception) -> Finding:
    """A message of ours as a finding: what and where, then, after the last semicolon, the remedy."""
    detail, _, remedy = str(error).rpartition("; ")
    return broken(subject, detail or remedy, remedy if detail else "")


class ProbeFailed(Exception):
    """A probe crashed, or said something else than JSON; the message is the last that it said."""


class ProbeTimedOut(Exception):
    """A probe did not answer in time, which says nothing of what it looked at."""


def probe(code: str, *arguments: str) -> Any:
    """Runs `code` in a Python of its own and returns what it prints as JSON in its last line.

    Native libraries are examined so: one that aborts or hangs must not take the examination along. Raises ProbeFailed,
    ProbeTimedOut.
    """
    shim = [sys.executable, "-I", "-S", _SHIM, str(os.getpid()), ""]
    with subprocess.Popen(
        [*shim, sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=_PROBE_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise ProbeTimedOut(f"no answer within {_PROBE_TIMEOUT_S:g} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started, which may hold the pipes
    lines = output.strip().splitlines()
    if process.returncode != 0 or not lines:
        said = (errors.strip().splitlines() or ["it said nothing"])[-1]
        raise ProbeFailed(f"exit status {process.returncode}: {said}")
    try:
        return json.loads(lines[-1])
    except ValueError as error:
        raise ProbeFailed(f"unexpected output {lines[-1]!r}") from error
