"""Serves a worker's HTTP port, open from start to end, even before the model is loaded."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry

from services.node import DebugServer
from services.worker.assembly import Role, WorkerParts

SIMULATION = "a simulation: nothing is computed, tokens mean nothing"


class WorkerHttp:
    """Serves metrics, health and state of a worker that may not be there yet."""

    def __init__(self, role: Role, tokens: Sequence[str] = (), open_metrics: bool = True) -> None:
        """`tokens`, `open_metrics`: as `DebugServer`."""
        self.phase = "starting"
        """Of the worker's start, or of its end; empty while it serves."""
        self.stuck = ""
        """What stands still; empty: nothing."""
        self.drain_asked = asyncio.Event()
        """Somebody wants the worker to take nothing new on, and to let go what it has."""
        self._role = role
        self._parts: WorkerParts | None = None
        self._service_state: Callable[[], Mapping[str, object]] = dict
        nothing_yet = CollectorRegistry()
        self._server = DebugServer(
            lambda: self._parts.metrics.registry if self._parts else nothing_yet,
            state=self._state,
            check_integrity=self._check_integrity,
            unhealthy=self._unhealthy,
            not_ready=self._not_ready,
            note=lambda: SIMULATION if self._parts and self._parts.engine.capabilities.is_simulation else "",
            tokens=tokens,
            open_metrics=open_metrics,
            drain=self.drain_asked.set,
        )

    async def start(self, host: str, port: int) -> str:
        """Listen; port 0 takes a free one. Return "host:port". Raises OSError."""
        return await self._server.start(host, port)

    async def close(self) -> None:
        await self._server.close()

    def watch(self, parts: WorkerParts, service_state: Callable[[], Mapping[str, object]]) -> None:
        """Tell of this worker from now on, after its end, too."""
        self._parts, self._service_state = parts, service_state
        parts.metrics.exchange.watch_port("http", lambda: self._server.num_strangers)

    @property
    def is_ready(self) -> bool:
        """What `/ready` says."""
        return not self._not_ready()

    def _unhealthy(self) -> str:
        if self._parts is None:
            return self.phase
        if self._parts.thread.crashed.done():
            return "the engine has crashed"
        return "" if self._parts.exchange.can_move_blocks else "no transport works"

    def _not_ready(self) -> str:
        return self.phase or self._unhealthy() or (f"no progress of: {self.stuck}" if self.stuck else "")

    def _state(self) -> dict[str, object]:
        parts = self._parts
        if parts is None:
            return {"role": self._role, "phase": self.phase}
        return {
            "worker_id": parts.worker_id,
            "incarnation": parts.incarnation,
            "role": self._role,
            "phase": self.phase,
            "is_simulation": parts.engine.capabilities.is_simulation,
            "stuck": self.stuck,
            "engine": dataclasses.asdict(parts.engine.load()),
            "rates": parts.rates.rates.to_wire(),
            "host_tier": parts.engine.host_figures() or None,
            "exchange": parts.exchange.state(),
            "shunned_holders": parts.fetcher.shunned,
            **self._service_state(),
            "index": parts.index_feed.state(),
            "store_feed": parts.store_feed and parts.store_feed.state(),
        }

    async def _check_integrity(self) -> None:
        if self._parts is not None:
            await self._parts.thread.call(self._parts.engine.check_integrity)
