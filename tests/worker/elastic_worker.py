"""Elastic workers within the test's loop, which order prompts from each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tandem.v1 import worker_pb2 as pb

from services.elastic.config import ElasticConfig
from services.elastic.service import ElasticService
from services.engine.native import Engine
from tests.memory_orders import MemoryOrders, MemoryServer
from tests.memory_transport import Switchboard
from tests.worker.decode_worker import DecodeWorker, Send


class ElasticWorker(DecodeWorker):
    """Serves orders at the address that is its name. See `DecodeWorker`."""

    _role = "elastic"

    def __init__(
        self, name: str, model: Path, switchboard: Switchboard, orders: MemoryOrders, **settings: object
    ) -> None:
        super().__init__(name, model, switchboard, None, orders, **settings)
        self.num_orders = 0
        self._server = MemoryServer()
        self.service.register(self._server)
        orders.servers[name] = self._server
        served = self._server.prefill
        assert served is not None

        async def counted(order: pb.PrefillRequest, send: Any) -> None:
            self.num_orders += 1
            await served(order, send)

        self._server.prefill = counted

    def _configured(self, **settings: Any) -> Engine:
        self._config = ElasticConfig(**settings)
        return Engine.from_config(self._config)

    def _made(self) -> ElasticService:
        assert isinstance(self._config, ElasticConfig)
        return ElasticService(self._config, self.parts)

    async def serve_session(self, orders: AsyncIterator[pb.SessionRequest], send: Send) -> None:
        assert self._server.session is not None
        await self._server.session(orders, send)

    async def close(self) -> None:
        await self.service.close()
        await self._server.stop()  # as a process does: calls end before transfers
        await super().close()

    @property
    def _labels(self) -> dict[str, str]:
        return {"model_name": str(self._config.model), "role": "elastic"}

    @property
    def target(self) -> pb.PrefillTarget:
        """What a router names it by."""
        return pb.PrefillTarget(
            worker_id=self.parts.worker_id,
            incarnation="1",
            grpc_address=self.parts.worker_id,
            kv_address=self.parts.exchange.address,
        )

    @property
    def state(self) -> dict[str, Any]:
        return dict(self.service.state())
