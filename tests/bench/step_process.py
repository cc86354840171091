"""A process that computes steps on request, such as another engine in an environment of its own.

It is sent lines of JSON on its standard input, and answers each with one line through a pipe whose descriptor it is
given as `--answers`. What it prints goes to a log.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TAIL_CHARACTERS = 3000


class StepProcessFailed(Exception):
    """It ended, or did not answer in time; with the end of its log."""


class StepProcess:
    """Ends with the `with` block, and also when this process does: its input ends then."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        answers, theirs = os.pipe()
        self._answers = os.fdopen(answers, encoding="utf-8")
        try:
            with log.open("w", encoding="utf-8") as output:
                self._process = subprocess.Popen(
                    [*command, "--answers", str(theirs)],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    pass_fds=[theirs],
                    text=True,
                )
        except BaseException:
            self._answers.close()
            raise
        finally:
            os.close(theirs)

    def __enter__(self) -> StepProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self, grace_s: float = 30.0) -> None:
        """End its input, and the process with it; kill it if a step keeps it from noticing for so long."""
        self._answers.close()
        try:
            self._process.communicate(timeout=grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def ask(self, order: str, timeout_s: float, **arguments: object) -> dict[str, Any]:
        """Send an order and wait for its answer. Raises StepProcessFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"order": order, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            self.close()
            raise self._failed(f"had ended before it was asked to {order}") from error
        return self.answer(order, timeout_s)

    def answer(self, order: str, timeout_s: float) -> dict[str, Any]:
        """Wait for a line. Answers are whole lines and one for one order, so none waits in our buffer."""
        if not select.select([self._answers], [], [], timeout_s)[0]:
            raise self._failed(f"did not {order} within {timeout_s:g} s")
        line = self._answers.readline()
        if not line.endswith("\n"):
            self.close()  # so that its log is whole
            raise self._failed(f"ended instead of answering ({order})")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise self._failed(f"answered {line[:80]!r} ({order})")
        return answer

    def _failed(self, what: str) -> StepProcessFailed:
        tail = self._log.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARACTERS:]
        return StepProcessFailed(f"the process {what}; the end of {self._log}:\n{tail}")
