"""Judges how long a decode worker may say nothing. Pure: the clock is passed in."""

from __future__ import annotations

_BEATS = 4  # that a worker may miss
_SUSPECT_BEATS = 2.5


class Silence:
    """One session's. `look` at it every `look_s`."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.heartbeat_s = timeout_s / _BEATS
        """How often the worker is asked to say something."""
        self.look_s = timeout_s / 16
        self.is_broken = False
        """Whether the worker has been silent for longer than the time-out, as of the last look."""
        self._is_promised = False
        self._heard_s = 0.0
        self._look_due_s = 0.0
        self._was_blind_until_s = 0.0

    def begin(self, now_s: float, is_promised: bool) -> None:
        """A new stream. A worker that does not know heartbeats has promised none, and may be silent."""
        self._is_promised, self._heard_s, self._look_due_s = is_promised, now_s, now_s + self.look_s
        self.is_broken = False

    def heard(self, now_s: float) -> None:
        """The worker has said something."""
        self._heard_s = now_s

    def silent_s(self, now_s: float) -> float:
        """Seconds since the worker has said something."""
        return max(now_s - self._heard_s, 0.0)

    def look(self, now_s: float) -> None:
        """Judge as of when the look was due: what came while our own loop stood still waits unread."""
        if self._is_blind(now_s):
            self._was_blind_until_s = now_s + self.timeout_s
        silent_s = min(now_s, self._look_due_s) - self._heard_s
        self._look_due_s = now_s + self.look_s
        self.is_broken = self._is_promised and silent_s > self.timeout_s

    def was_blind(self, now_s: float) -> bool:
        """Whether our own loop stood still a moment ago, for so long that the worker may have given us up."""
        return self._is_blind(now_s) or now_s < self._was_blind_until_s

    def _is_blind(self, now_s: float) -> bool:
        return now_s - self._look_due_s > self.timeout_s

    def is_suspect(self, now_s: float) -> bool:
        """Whether the worker is late."""
        return self._is_promised and min(now_s, self._look_due_s) - self._heard_s > _SUSPECT_BEATS * self.heartbeat_s
