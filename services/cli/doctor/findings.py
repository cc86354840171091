"""Defines a finding of `tandem doctor`: a verdict on one thing, and the remedy where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any

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
    """A probe crashed, hung, or said something else than JSON; the message is the last that it said."""


def probe(code: str, *arguments: str) -> Any:
    """Runs `code` in a Python of its own and returns what it prints as JSON in its last line.

    Native libraries are examined so: one that aborts or hangs must not take the examination along. Raises ProbeFailed.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeFailed(f"no answer within {_PROBE_TIMEOUT_S:g} s") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ProbeFailed(f"exit status {done.returncode}: {said}")
    try:
        return json.loads(lines[-1])
    except ValueError as error:
        raise ProbeFailed(f"unexpected output {lines[-1]!r}") from error
