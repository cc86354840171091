"""Reads when a request is over, and when its first token is late: by the settings, or sooner where the client says so.

Both deadlines come in headers that gateways and clients know already: `x-slo-ttft-ms` is that of the Gateway API's
inference extension (llm-d), `x-envoy-expected-rq-timeout-ms` is what Envoy tells the server of its own patience.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.router.config import RouterConfig
from services.router.edge.http import header
from services.router.errors import invalid
from services.router.sse import Message

TTFT_HEADER = b"x-slo-ttft-ms"
TIMEOUT_HEADER = b"x-envoy-expected-rq-timeout-ms"
_MAX_MS = 1e10


@dataclass(frozen=True)
class Deadlines:
    """Of one request, by the clock of its arrival; infinity: none."""

    end_s: float
    total_s: float
    """From the request's arrival to its end."""
    first_token_s: float
    first_token_is_clients_own: bool

    @classmethod
    def of(cls, scope: Message, config: RouterConfig, arrived_s: float) -> Deadlines:
        """Raises ApiError 400 for a header that is no positive number."""
        client_end, client_first = _seconds(scope, TIMEOUT_HEADER), _seconds(scope, TTFT_HEADER)
        total_s = min(config.request_timeout_s or math.inf, client_end)
        end_s = arrived_s + total_s
        first_s = arrived_s + min(config.ttft_deadline_s or math.inf, client_first)
        # Without a first token in time there is no end in time either.
        is_own = client_first < math.inf or (client_end < math.inf and end_s < first_s)
        return cls(end_s, total_s, min(first_s, end_s), is_own)

    @classmethod
    def of_settings(cls, config: RouterConfig, arrived_s: float) -> Deadlines:
        """Of a request that says nothing."""
        return cls.of({"headers": ()}, config, arrived_s)

    def left_s(self, now_s: float) -> float | None:
        """Seconds until the end, at least 1 ms; None: there is none."""
        return max(self.end_s - now_s, 0.001) if self.end_s < math.inf else None


def _seconds(scope: Message, name: bytes) -> float:
    text = header(scope, name)
    if text is None:
        return math.inf
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 <= milliseconds <= _MAX_MS:
        raise invalid(f"The header {name.decode()} must be a number of milliseconds, not {text[:40]!r}.")
    return milliseconds / 1000 if milliseconds else math.inf  # Envoy's 0 is no time-out
