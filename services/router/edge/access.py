"""Logs and counts each HTTP request once: its end, its tenant, its times. No text, no keys.

`Edge` begins a record with each request and closes it with its end, however it ends; on the way the endpoints write
down what they know. Of an error the code is logged and not the message, which may quote the request.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from services.router.errors import ApiError
from services.router.metrics import RouterMetrics

log = logging.getLogger(__name__)

CLIENT_GONE = 499
"""The status in our own books of a request whose client did not wait; as nginx counts it."""

_ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize")


@dataclass
class AccessRecord:
    """One HTTP request. `path` is what the client wrote; only those that we serve are shown."""

    method: str
    path: str
    started_s: float
    status: int = CLIENT_GONE
    """How it went in the end, which for a stream that broke is not what its head says."""
    error: str | None = None
    started: bool = False
    finished: bool = False
    """Of the answer: its head, and its last byte."""
    facts: Callable[[], dict[str, object]] = dict
    """What the line says besides; asked where there is one."""

    def failed(self, error: ApiError) -> None:
        """It ends with this error, whatever was sent before."""
        self.status, self.error = error.status, error.code or error.type

    def left(self) -> None:
        """The client has gone."""
        self.status, self.error = CLIENT_GONE, "client_gone"

    @property
    def endpoint(self) -> str:
        """The endpoint, in a few words."""
        return self.path if self.path in _ENDPOINTS else "other"

    def close(self, request_id: str, metrics: RouterMetrics, is_shown: bool, now_s: float) -> None:
        """Count and log it. `now_s`: by the clock of `started_s`."""
        metrics.count_request(self.endpoint, self.status)
        facts, self.facts = self.facts, dict  # which hold the whole request
        level = logging.INFO if is_shown and self.endpoint != "other" else logging.DEBUG
        if self.status >= 500 and self.endpoint != "other":
            level = logging.WARNING
        if not log.isEnabledFor(level):
            return
        extra = {
            "request_id": request_id,
            "status": self.status,
            "seconds": round(now_s - self.started_s, 4),
        }
        if self.error is not None:
            extra["error"] = self.error
        log.log(level, "%s %s", self.method, self.endpoint, extra=extra | facts())
