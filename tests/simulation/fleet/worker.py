"""One simulated worker: the product's parts and service over a native engine, on simulated outsides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from unittest import mock

import msgspec

from kvstore.errors import KVStoreError
from kvstore.exchange import Outside
from kvstore.peer_keys import PeerKeys
from kvstore.registry import Registrar, WorkerRecord
from services.decode.config import DecodeConfig
from services.decode.service import DecodeService
from services.elastic.config import ElasticConfig
from services.elastic.service import ElasticService
from services.prefill.config import PrefillConfig
from services.prefill.service import PrefillService
from services.worker import assembly
from services.worker.assembly import Role, Seams, WorkerParts, assemble
from services.worker.config import WorkerConfig
from tests.simulation.fleet import elastic
from tests.simulation.fleet.computation import FINGERPRINT, MAX_MODEL_LEN, make_engine
from tests.simulation.fleet.orders import SimOrders, SimOrderServer
from tests.simulation.fleet.redis_host import LEASE_S, REDIS_URL
from tests.simulation.pool import Invariant
from tests.simulation.threads import SimThreads

if TYPE_CHECKING:
    from tests.simulation.fleet.world import FleetWorld

ROLES: Final[dict[str, Role]] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
ELASTIC_ROLES: Final[dict[str, Role]] = dict.fromkeys(elastic.STARTING_ROLES, "elastic")
STORE: Final = "s0"
MODEL: Final = "sim"
BLOCK_SIZE: Final = 16
PEER_KEYS: Final = PeerKeys((b"the key of the simulated fleet",))
_NUM_BLOCKS: Final = 24
_NUM_HOST_SLOTS: Final = 12
_MAX_STEP_S: Final = 0.15  # so that streams last, and faults come in the middle of some
_KV_PORT, _ORDER_PORT = 7000, 8000
_WORKER: Final = {
    "model": MODEL,
    "redis": REDIS_URL,
    "lease_s": LEASE_S,
    "block_size": BLOCK_SIZE,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "peer_timeout_s": 4.0,
    "prefix_fetch": "always",
    "prefix_fetch_timeout_s": 3.0,
    "store_write_through": "all",
}


class SimWorker:
    """One start of a prefill, decode or elastic worker."""

    def __init__(self, world: FleetWorld, name: str, role: Role, incarnation: str) -> None:
        self.name, self.role, self.incarnation = name, role, incarnation
        self.is_leaving = False
        self.num_filled = 0
        self._world = world
        self.process = world.loop.new_process(f"{name}/{incarnation}")
        with world.loop.within(self.process):
            config = _config(name, role)
            stopwatch = elastic.Stopwatch(self.unix_s)
            self.threads = SimThreads(world.loop, max_turn_s=_MAX_STEP_S)
            self.engine = (
                make_engine(config, _NUM_BLOCKS, _NUM_HOST_SLOTS, stopwatch.clock, stopwatch.spend)
                if role == "elastic"
                else make_engine(config, _NUM_BLOCKS, _NUM_HOST_SLOTS, self.unix_s)
            )
            stopwatch.watch(self.engine)
            self.transport = world.make_transport(self.engine.memory, self.process.name)
            self.server = SimOrderServer(world.orders, f"{name}:{_ORDER_PORT}", self.process)
            outside = Outside(world.net.of(name, self.process), self.clock, world.new_id, self.threads)
            seams = Seams(SimOrders(world.orders, name, self.process), outside, self.unix_s, PEER_KEYS)
            with mock.patch.object(assembly, "make_transports", return_value=[self.transport]):
                self.parts: WorkerParts = assemble(config, role, self.engine, name, incarnation, seams)
            self._note_fetches()
            self.service = self._make_service(config)
            self.service.register(self.server)
            self.record = self._record()
            self._registrar = Registrar(REDIS_URL, self.record, LEASE_S)

    def _make_service(self, config: WorkerConfig) -> DecodeService | PrefillService | ElasticService:
        if isinstance(config, ElasticConfig):
            return ElasticService(config, self.parts)
        if isinstance(config, DecodeConfig):
            return DecodeService(config, self.parts)
        assert isinstance(config, PrefillConfig)
        return PrefillService(config, self.parts)

    def _note_fetches(self) -> None:
        count = self.parts.fetcher._count

        def note(tier: str, outcome: str, num_blocks: int, num_bytes: int) -> None:
            self._world.reach(f"prefix fetch: {outcome}")
            count(tier, outcome, num_blocks, num_bytes)

        self.parts.fetcher._count = note

    def clock(self) -> float:
        return self._world.loop.time() + self.process.clock_ahead_s

    def unix_s(self) -> float:
        return 1e9 + self.clock()

    async def start(self) -> None:
        await self.parts.exchange.start(self.name, _KV_PORT)
        self.parts.thread.start(self.service)
        self.server.start()
        await self.parts.index_feed.start()
        assert self.parts.store_feed is not None
        await self.parts.store_feed.start(self.record.kv_address)
        await self._registrar.start()

    async def leave(self, drain_s: float) -> None:
        """What a worker does at SIGTERM: refuse, finish, then close from the outside in."""
        self._registrar.update(msgspec.structs.replace(self.record, draining=True))
        self.service.begin_drain()
        await self.service.drain(drain_s)
        await self.close()

    async def close(self) -> None:
        await self._registrar.close()
        assert self.parts.store_feed is not None
        await self.parts.store_feed.close()
        await self.parts.index_feed.close()
        await self.service.close()
        await self.server.stop()
        await self.parts.exchange.close()
        await self.service.settle()
        await self.parts.orders.close()
        await self.parts.fetcher.settle()
        await self.parts.host_prefixes.settle()
        for _ in range(2):  # what was posted before has run, and what that led to
            await self.parts.thread.call(lambda: None)
        self.check_at_rest()
        await self.parts.thread.stop()

    def check_at_rest(self) -> None:
        """Nobody has anything of ours any more."""
        self._world.judge(Invariant.NO_LEAK)
        self._world.judge(Invariant.ONE_OWNER)
        load, state = self.engine.load(), self.parts.exchange.state()
        held = {"running": load.num_running, "waiting": load.num_waiting, "lent": load.num_lent_blocks}
        held |= {what: len(state[what]) for what in ("fetches", "leases")}  # type: ignore[arg-type]
        held |= {what: value for what, value in self.service.state().items() if isinstance(value, int)}
        left = {what: count for what, count in held.items() if count and what != "draining"}
        if left:
            self._world.report(Invariant.NO_LEAK, f"{self.process.name} at rest: {left}")
        try:
            self.engine.check_integrity()
        except (AssertionError, KVStoreError) as error:
            self._world.report(Invariant.ONE_OWNER, f"{self.process.name}: {error}")

    def _record(self) -> WorkerRecord:
        return WorkerRecord(
            worker_id=self.name,
            role=self.role,
            incarnation=self.incarnation,
            served_model_names=(MODEL,),
            model_path=MODEL,
            tokenizer_path=MODEL,
            model_fingerprint=FINGERPRINT,
            grpc_address=f"{self.name}:{_ORDER_PORT}",
            kv_address=f"{self.name}:{_KV_PORT}",
            http_address="",
            block_size=BLOCK_SIZE,
            num_blocks=_NUM_BLOCKS,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=8,
            dtype="float32",
            transports=("memory",),
            local_prefill_max_tokens=BLOCK_SIZE,
        )


def _config(name: str, role: Role) -> WorkerConfig:
    if role == "elastic":
        return ElasticConfig(
            **_WORKER,  # type: ignore[arg-type]
            advertise_host=name,
            role=elastic.STARTING_ROLES[name],
            tpot_objective=elastic.TPOT_OBJECTIVE_MS,
            lease_ttl_s=5.0,
            lease_max_s=60.0,
            prefill_queue_timeout_s=8.0,
            handoff_timeout_s=4.0,
        )
    if role == "prefill":
        return PrefillConfig(**_WORKER, lease_ttl_s=5.0, lease_max_s=60.0)  # type: ignore[arg-type]
    return DecodeConfig(**_WORKER, prefill_queue_timeout_s=8.0, handoff_timeout_s=4.0)  # type: ignore[arg-type]
