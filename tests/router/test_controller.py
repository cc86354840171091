"""The controller of roles: one leader among routers, who tells workers, hears them, and does nothing it cannot see."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest
from tandem.v1 import worker_pb2 as pb

from kvstore.registry import open_home
from services.budgets import Objectives
from services.orders import budgets_to_proto
from services.router.config import RouterConfig
from services.router.finished import Finished
from services.router.fleet import Workers
from services.router.metrics import RouterMetrics
from services.router.objectives import ObjectiveTable
from services.router.roles import Controller, Ledger, Settings, Tally, attainment_of, demand_of
from services.router.roles.lease import LEASE_S, RESIGN, SCRIPT, Lease
from services.router.views import CONTROLLER
from tests.memory_orders import MemoryOrders, MemoryServer
from tests.router.bending_worker import BendingWorker
from tests.router.harness import FakeMembership, running_router
from tests.waiting import until

OBJECTIVES = Objectives(ttft_s=1.5, tpot_s=0.04)
SETTINGS = Settings(window_s=6, hold_s=2, dwell_s=8)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class FakeRedis:
    """The scripts of leases, as they are meant."""

    clock: Clock
    is_away: bool = False
    takes_s: float = 0.0
    """How long an answer is on its way."""
    leader: tuple[str, float] = ("", 0.0)
    accounts: dict[str, tuple[float, bytes]] = field(default_factory=dict)

    async def eval(self, script: str, num_keys: int, *keys_and_arguments: str) -> object:
        router_id, *rest = keys_and_arguments[num_keys:]
        if self.is_away:
            raise ConnectionError("nobody there")
        now_s = self.clock()
        name, until_s = self.leader
        if now_s >= until_s:
            name = ""
        if script == RESIGN:
            self.leader = ("", 0.0) if name == router_id else self.leader
            return self.accounts.pop(router_id, None) is not None
        assert script == SCRIPT
        lease_ms, account = rest
        self.accounts[router_id] = (now_s, account.encode())
        if float(lease_ms) and name in ("", router_id):
            name, self.leader = router_id, (router_id, now_s + float(lease_ms) / 1000)
        self.clock.now_s += self.takes_s
        if name != router_id:
            return [name.encode()]
        return [name.encode(), *(said for at_s, said in self.accounts.values() if now_s - at_s <= 5)]


class Fleet:
    """Bending workers, and controllers that see them. One call of `beats` is so many seconds."""

    def __init__(self, workers: Workers, membership: FakeMembership, orders: MemoryOrders) -> None:
        self.clock = Clock()
        self.redis = FakeRedis(self.clock)
        self.seen, self._membership, self._orders = workers, membership, orders
        self.workers: list[BendingWorker] = []
        self.ledgers: list[Ledger] = []
        self.is_short = True

    async def serve_with(self, *workers: BendingWorker) -> None:
        self.workers = list(workers)
        self._orders.servers.clear()
        for worker in workers:
            self._orders.servers[worker.record.grpc_address] = server = MemoryServer()
            server.serve_sessions(worker.serve)
        self._membership.set(*(worker.record for worker in workers))
        keys = {worker.record.key for worker in workers}
        await until(lambda: self.seen.num_sessions_up == len(workers) and {r.key for r in self.seen.records} == keys)

    def controller(self, router_id: str = "r1", settings: Settings = SETTINGS, stands: bool = True) -> Controller:
        ledger = Ledger(settings.window_s, self.clock)
        self.ledgers.append(ledger)
        return Controller(
            self.seen,
            ledger,
            lambda name: 0.0,
            self.redis,
            router_id,
            OBJECTIVES,
            settings,
            stands,
            RouterMetrics(),
            self.clock,
            time.time,
        )

    async def beats(self, num_seconds: int, *controllers: Controller) -> None:
        """Seconds in which prompts wait and streams do not, if the fleet is short; and what workers said is heard."""
        for _ in range(num_seconds):
            self.clock.now_s += 1
            for ledger in self.ledgers:
                for _ in range(4):
                    ledger.arrived("tiny", 1, 2500)
                    ledger.finished(finished(ttft_s=4.0 if self.is_short else 0.3))
            for controller in controllers:
                await controller.beat()
            await self.heard()

    async def heard(self) -> None:
        """Whatever was told has arrived, and so has what workers say then."""
        for _ in range(20):
            await asyncio.sleep(0)
        roles = dict(self.seen.roles_now())
        await until(
            lambda: dict(self.seen.roles_now()) == {w.record.worker_id: w.role for w in self.workers} or not roles
        )

    @property
    def roles(self) -> str:
        return "".join(worker.role[0] for worker in self.workers)

    @property
    def told(self) -> list[tuple[str, str]]:
        """The flips that workers were sent."""
        pairs = [(worker, each.role) for worker in self.workers for each in worker.told]
        return [(worker.record.worker_id, role) for worker, role in pairs if role != worker.began_as]


def finished(ttft_s: float = 0.3, tpot_s: float = 0.01, **facts: object) -> Finished:
    plain = {
        "model": "tiny", "tenant": "", "priority": 0, "finish_reason": "stop", "num_prompt_tokens": 2500,
        "num_cached_tokens": 0, "num_generated_tokens": 60, "ttft_s": ttft_s, "tpot_s": tpot_s,
        "objectives": OBJECTIVES, "unix_s": 0.0,
    }  # fmt: skip
    return Finished(**(plain | facts))  # type: ignore[arg-type]


@asynccontextmanager
async def make_fleet(roles: str = "pddd") -> AsyncIterator[Fleet]:
    membership, orders = FakeMembership(), MemoryOrders()
    workers = Workers(membership, "r", orders, time.monotonic, 0.05)  # type: ignore[arg-type]
    workers.start()
    fleet = Fleet(workers, membership, orders)
    names = {"p": "prefill", "d": "decode"}
    try:
        await fleet.serve_with(*(BendingWorker(f"w{n}", names[role]) for n, role in enumerate(roles)))
        yield fleet
    finally:
        await workers.close()
        await orders.close()


def decisions(controller: Controller) -> list[dict[str, object]]:
    (row,) = controller.to_json()
    return row["decisions"]  # type: ignore[return-value]


# ---- one leader ----------------------------------------------------------------


async def test_it_flips_a_worker_that_then_says_so_itself():
    async with make_fleet() as fleet:
        controller = fleet.controller()
        await fleet.beats(SETTINGS.dwell_s - 1, controller)  # type: ignore[arg-type]
        assert fleet.told == []
        await fleet.beats(5, controller)
        assert fleet.roles == "ppdd"
        assert fleet.told == [("w1", "prefill")]
        (flip,) = [each for each in decisions(controller) if each["decision"] == "flip"]
        assert flip["changes"][0]["worker_id"] == "w1"  # type: ignore[index]
        assert flip["counterfactual"]
        assert {row["worker_id"] for row in flip["workers"]} == {"w0", "w1", "w2", "w3"}  # type: ignore[attr-defined]
        json.dumps(controller.to_json(), allow_nan=False)


async def test_of_two_controllers_one_leads_and_sums_what_both_count():
    async with make_fleet() as fleet:
        one, two = fleet.controller("r1"), fleet.controller("r2")
        await fleet.beats(6, one, two)
        (led,), (followed,) = one.to_json(), two.to_json()
        assert (led["is_leader"], followed["is_leader"]) == (True, False)
        assert led["leader"] == followed["leader"] == "r1"
        assert followed["decisions"] == []
        inputs = decisions(one)[-1]["inputs"]
        assert inputs["requests_per_s"] == pytest.approx(8, rel=0.3)  # type: ignore[index]
        assert CONTROLLER.merge([two.to_json(), one.to_json()]) == one.to_json()
        await fleet.beats(8, one, two)
        assert fleet.told == [("w1", "prefill")]


async def test_another_one_leads_when_the_leader_is_gone_and_waits_out_a_dwell_time():
    async with make_fleet() as fleet:
        one, two = fleet.controller("r1"), fleet.controller("r2")
        await fleet.beats(5, one, two)
        await fleet.beats(round(LEASE_S), two)  # nobody has heard of the first one since
        (row,) = two.to_json()
        assert row["is_leader"]
        assert not one.to_json()[0]["is_leader"]
        began = fleet.clock.now_s
        while not fleet.told:
            await fleet.beats(1, two)
        assert fleet.clock.now_s - began >= SETTINGS.dwell_s - 2
        assert fleet.told == [("w1", "prefill")]


async def test_one_that_ends_lets_another_one_lead_at_once():
    async with make_fleet() as fleet:
        one, two = fleet.controller("r1"), fleet.controller("r2")
        one.start()
        await fleet.beats(2, one, two)
        await one.close()
        await fleet.beats(1, two)
        assert two.to_json()[0]["is_leader"]


async def test_one_that_is_switched_off_is_counted_and_never_leads():
    async with make_fleet() as fleet:
        off, on = fleet.controller("r1", stands=False), fleet.controller("r2")
        await fleet.beats(6, off, on)
        assert (off.to_json()[0]["is_leader"], on.to_json()[0]["is_leader"]) == (False, True)
        assert decisions(on)[-1]["inputs"]["requests_per_s"] == pytest.approx(8, rel=0.3)  # type: ignore[index]


@pytest.mark.parametrize("seed", range(20))
async def test_never_do_two_hold_the_lease_at_a_time(seed: int):
    draw, clock = random.Random(seed), Clock()
    redis = FakeRedis(clock)
    leases = [Lease(redis, "m", f"r{number}", clock) for number in range(3)]
    leaders = set()
    for _ in range(300):
        clock.now_s += draw.choice([0.1, 1.0, 1.0, 3.0, 6.0])
        redis.is_away, redis.takes_s = draw.random() < 0.2, draw.choice([0.0, 0.3])
        lease = draw.choice(leases)
        try:
            if draw.random() < 0.05:
                await lease.resign()
            else:
                await lease.beat("{}", stands=True)
        except ConnectionError:
            assert not lease.is_held
        held = [number for number, each in enumerate(leases) if each.is_held]
        assert len(held) <= 1
        leaders.update(held)
    assert len(leaders) == 3


async def test_redis_keeps_leases_and_accounts_as_the_fake_does(redis_url):
    async with open_home(redis_url, 5.0) as home:
        one, two, off = (Lease(home, "m", f"r{number}", time.monotonic) for number in range(3))
        assert (await off.beat("zero", stands=False)).leader == ""
        first = await one.beat("first", stands=True)
        assert (first.leader, first.accounts) == ("r0", (b"zero", b"first")) or set(first.accounts or ()) == {
            b"zero",
            b"first",
        }
        second = await two.beat("second", stands=True)
        assert (second.leader, second.accounts) == ("r0", None)
        assert (one.is_held, two.is_held) == (True, False)
        assert set((await one.beat("again", stands=True)).accounts or ()) == {b"zero", b"again", b"second"}
        await one.resign()
        assert not one.is_held
        assert (await two.beat("mine", stands=True)).leader == "r1"


# ---- what fails ----------------------------------------------------------------


async def test_nothing_is_decided_while_redis_is_away():
    async with make_fleet() as fleet:
        controller = fleet.controller()
        await fleet.beats(2, controller)
        fleet.redis.is_away = True
        await fleet.beats(30, controller)
        assert fleet.told == []
        (row,) = controller.to_json()
        assert not row["is_leader"]
        assert "Redis is away" in str(row["trouble"])
        fleet.redis.is_away = False
        await fleet.beats(SETTINGS.dwell_s - 1, controller)  # type: ignore[arg-type]
        assert fleet.told == []
        await fleet.beats(6, controller)
        assert fleet.told == [("w1", "prefill")]


async def test_a_lost_message_is_sent_again_and_a_worker_that_never_takes_it_is_left_alone():
    async with make_fleet() as fleet:
        controller = fleet.controller()
        fleet.workers[1].takes = False
        await fleet.beats(14, controller)
        assert fleet.told
        assert set(fleet.told) == {("w1", "prefill")}
        num_told = len(fleet.told)
        fleet.workers[1].takes = True
        await fleet.beats(3, controller)
        assert fleet.told == [("w1", "prefill")] * (num_told + 1)
        assert fleet.roles == "ppdd"


async def test_a_restarted_worker_begins_with_its_role_and_is_not_told_its_predecessor_s():
    async with make_fleet() as fleet:
        controller = fleet.controller()
        await fleet.beats(13, controller)
        assert fleet.roles == "ppdd"
        again = BendingWorker("w1", "decode")
        await fleet.serve_with(fleet.workers[0], again, *fleet.workers[2:])
        await fleet.beats(4, controller)
        assert fleet.told == []
        assert fleet.roles == "pddd"


async def test_an_old_frame_never_flips():
    async with make_fleet() as fleet:
        controller = fleet.controller(settings=Settings(window_s=6, hold_s=2, dwell_s=8, max_age_s=0.0))
        await fleet.beats(30, controller)
        assert fleet.told == []
        assert "s old" in str(decisions(controller)[-1]["reason"])


async def test_a_worker_without_the_feature_stays_as_it_is():
    async with make_fleet() as fleet:
        stiff = [BendingWorker(f"w{n}", role, features=()) for n, role in enumerate(("prefill", "decode", "decode"))]
        await fleet.serve_with(*stiff)
        controller = fleet.controller()
        await fleet.beats(30, controller)
        assert fleet.told == []


async def test_a_lease_that_ends_while_redis_answers_tells_nobody_anything():
    async with make_fleet() as fleet:
        controller = fleet.controller()
        await fleet.beats(7, controller)
        fleet.redis.takes_s = LEASE_S
        await fleet.beats(6, controller)
        assert fleet.told == []


async def test_an_account_that_makes_no_sense_decides_nothing():
    async with make_fleet() as fleet:
        controller = fleet.controller()
        await fleet.beats(2, controller)
        for _ in range(20):
            fleet.redis.accounts["r9"] = (fleet.clock.now_s + 1, b'{"num_arrived": "many"}')
            await fleet.beats(1, controller)
        assert fleet.told == []
        assert "account" in str(controller.to_json()[0]["trouble"])


# ---- the ledger ------------------------------------------------------------------


def test_a_window_says_what_came_in_and_what_clients_got():
    clock = Clock()
    ledger = Ledger(10, clock)
    clock.now_s += 10
    for number in range(20):
        ledger.arrived("m", 1, 1000)
        late = number >= 15
        ledger.finished(
            finished(
                ttft_s=3.0 if late else 0.75, tpot_s=0.02, model="m", num_prompt_tokens=1000, num_cached_tokens=400
            )
        )
    ledger.finished(finished(model="m", finish_reason="error"))
    tally = ledger.window(["m", "other"], 7.0)
    attained, demand = attainment_of(tally), demand_of(tally)
    assert attained is not None
    assert (attained.num_requests, attained.num_ttft_met, attained.num_tpot_met) == (20, 15, 20)
    assert attained.ttft_ratio == pytest.approx(2.0, rel=0.05)
    assert attained.tpot_ratio == pytest.approx(0.5, rel=0.05)
    assert demand is not None
    assert (demand.requests_per_s, demand.prompt_tokens, demand.cached_tokens) == pytest.approx((2.0, 600.0, 400.0))
    assert demand.output_tokens == 60
    assert tally.num_queued_tokens == 7.0
    clock.now_s += 12
    assert attainment_of(ledger.window(["m"], 0.0)) is None


def test_who_has_no_objective_hides_nobody_that_misses_one():
    ledger = Ledger(10, Clock())
    for number in range(100):
        is_bound = number % 20 == 0
        ledger.finished(
            finished(
                ttft_s=3.0,
                tpot_s=0.08 if is_bound else None,  # a lone token has no time per token
                objectives=OBJECTIVES if is_bound else Objectives(tpot_s=OBJECTIVES.tpot_s),
                model="m",
            )
        )
    attained = attainment_of(ledger.window(["m"], 0.0))
    assert attained is not None
    assert attained.ttft_ratio == pytest.approx(2.0, rel=0.05)
    assert attained.tpot_ratio == pytest.approx(2.0, rel=0.05)


def test_an_absurd_objective_is_missed_by_as_much_as_can_be_said():
    ledger = Ledger(10, Clock())
    ledger.finished(finished(ttft_s=3.0, objectives=Objectives(ttft_s=1e-313, tpot_s=1e300), model="m"))
    attained = attainment_of(ledger.window(["m"], 0.0))
    assert attained is not None
    assert (attained.ttft_ratio, attained.tpot_ratio) == (1024.0, 0.0)


def test_windows_of_routers_add_up():
    clock = Clock()
    ledgers = [Ledger(10, clock) for _ in range(2)]
    clock.now_s += 10
    for ledger, ttft_s in zip(ledgers, (0.75, 3.0), strict=True):
        for _ in range(10):
            ledger.arrived("tiny", 1, 2500)
            ledger.finished(finished(ttft_s=ttft_s))
    total = Tally()
    for ledger in ledgers:
        total.add(ledger.window(["tiny"], 5.0))
    attained, demand = attainment_of(total), demand_of(total)
    assert attained is not None
    assert demand is not None
    assert (attained.num_requests, attained.num_ttft_met) == (20, 10)
    assert attained.ttft_ratio == pytest.approx(2.0, rel=0.05)
    assert demand.requests_per_s == pytest.approx(2.0)
    assert total.num_queued_tokens == 10


def test_what_comes_in_before_anybody_has_ended_is_no_demand_yet():
    ledger = Ledger(10, Clock())
    nothing = demand_of(ledger.window(["m"], 0.0))
    assert nothing is not None
    assert nothing.requests_per_s == 0
    ledger.arrived("m", 1, 100)
    assert demand_of(ledger.window(["m"], 0.0)) is None


def test_met_objectives_are_counted_and_what_is_no_objective_is_not():
    metrics = RouterMetrics()
    metrics.count_objectives(finished(ttft_s=1.0, tpot_s=0.05))
    metrics.count_objectives(finished(objectives=Objectives(ttft_s=0.5), ttft_s=None, finish_reason="error"))
    metrics.count_objectives(finished(objectives=Objectives()))
    text = metrics.exposition().decode()
    lines = {
        line.rsplit(" ", 1)[0] for line in text.splitlines() if line.startswith("tandem:requests_objective_met_total")
    }
    assert {line[line.index("{") :] for line in lines} == {
        '{met="true",model_name="tiny",objective="ttft"}',
        '{met="false",model_name="tiny",objective="tpot"}',
        '{met="false",model_name="tiny",objective="both"}',
        '{met="false",model_name="tiny",objective="ttft"}',
    }


def test_a_fleet_is_led_by_everybody_s_objectives_or_else_by_the_strictest():
    table = ObjectiveTable.of(0, 80, ["priority=0:ttft=500,tpot=40", "tenant=acme:ttft=800"])
    assert table.of_fleet == Objectives(0.5, 0.08)
    assert ObjectiveTable.of(0, 0, []).of_fleet == Objectives()


# ---- the page ----------------------------------------------------------------------


async def test_the_page_needs_a_key_as_the_others_do(make_worker):
    config = RouterConfig(api_key=("secret",), ttft_objective=1500)
    async with running_router(config, make_worker()) as router, httpx.AsyncClient(base_url=router.base_url) as http:
        assert (await http.get("/debug/controller")).status_code == 401
        answer = await http.get("/debug/controller", headers={"Authorization": "Bearer secret"})
        assert answer.json() == {"models": []}


def test_a_role_s_message_says_no_limit_by_saying_nothing():
    from services.budgets import Budgets
    from services.router.fleet.worker_load import budgets_from_proto

    for budgets in (Budgets(), Budgets(0.05, 128), Budgets(0.05), Budgets(prompt_tokens=32)):
        message = pb.Budgets.FromString(budgets_to_proto("decode", budgets).SerializeToString())
        assert (message.role, budgets_from_proto(message)) == ("decode", budgets)
