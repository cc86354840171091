"""Logs what strangers do to us: one line at a time, however often they do it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

INTERVAL_S: Final = 5.0


class Complaints:
    """Writes a line at most every `INTERVAL_S`, with the number of those that it has left out since the last one."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float]) -> None:
        self._logger = logger
        self._clock = clock
        self._quiet_until_s = -float("inf")
        self._num_left_out = 0

    def log(self, level: int, text: str, *values: object) -> None:
        """Write it, or count it."""
        now_s = self._clock()
        if now_s < self._quiet_until_s:
            self._num_left_out += 1
            return
        more = f" (and {self._num_left_out} more since the last such line)" if self._num_left_out else ""
        self._logger.log(level, text + "%s", *values, more)
        self._quiet_until_s, self._num_left_out = now_s + INTERVAL_S, 0
