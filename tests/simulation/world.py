"""One run: three workers that read from each other, a nemesis, and what must hold whatever it does.

    0 s         start; clients fetch prefixes, order prompts, tell each other what they have
    .. LOAD_S   the nemesis deals the faults that this seed has drawn (a swarm: each seed has its own mix)
    then        faults stop, the dead are restarted; within SERVE_S each worker gets a fresh block from each other one
    then        clients end, exchanges close, and everything is counted: blocks, outcomes, bytes

All randomness comes from the seed. `simulate` runs one; equal seeds give equal traces.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

from kvstore.block import BlockHash, BlockMemory
from kvstore.exchange import reader as exchange_reader
from kvstore.protocol import (
    Closed,
    ExchangeTimeouts,
    FetchMachine,
    LeaseMachine,
    LeaseOutcome,
    Quiesced,
    Resolve,
)
from kvstore.protocol import fetch as fetch_table
from kvstore.protocol import lease as lease_table
from tests.memory_transport import Faults, MemoryTransport, Switchboard
from tests.simulation.loop import SimLoop, Stuck
from tests.simulation.net import SimNet, Weather
from tests.simulation.node import Habits, Node, Order
from tests.simulation.pool import BLOCK_BYTES, Invariant, Violation
from tests.simulation.transport import TwoSidedTransport, Wire

LOAD_S: Final = 30.0
SERVE_S: Final = 30.0
WAIT_S: Final = 150.0
LEAVE_S: Final = 60.0
END_S: Final = 400.0
TIMEOUTS: Final = ExchangeTimeouts(
    heartbeat_s=1.0,
    peer_timeout_s=4.0,
    connect_s=5.0,
    close_s=3.0,
    lease_ttl_s=5.0,
    lease_max_s=60.0,
    offer_s=10.0,
    reserve_s=6.0,
    announce_s=6.0,
    read_s=4.0,
    confirm_s=3.0,
    drain_s=3.0,
)
_CHAINS: Final = 6
_CHAIN_BLOCKS: Final = 6

STANDING: Final = ("reorder", "split", "cut", "slow reads", "broken reads", "bit flips", "slow threads", "old records")
"""Faults of a whole run: they count once a seed, cuts each."""
DEALT: Final = (
    "delay",
    "partition",
    "kill",
    "vanish",
    "restart",
    "pause",
    "clock jump",
    "rot",
    "full pool",
    "abort storm",
)
USERS: Final = ("aborts", "revokes")


@dataclass(frozen=True)
class Report:
    """What a run has shown."""

    seed: int
    trace: str
    violations: tuple[Violation, ...]
    faults: Counter[str]
    reached: Counter[str]
    transitions: Counter[str]
    num_callbacks: int
    virtual_s: float


def simulate(seed: int) -> Report:
    """Run one seed to its verdict."""
    world = World(seed)
    with _watching(world):
        try:
            world.loop.run(world.main(), END_S)
        except Stuck as error:
            world.report(Invariant.WAITS_END, str(error))
        except Violation:
            pass  # it is noted
        for context in world.loop.errors:
            world.report(Invariant.NO_INTERNAL_ERROR, f"{context.get('message')}: {context.get('exception')!r}")
        violations, trace = tuple(world.violations), world.loop.trace
        num_callbacks, virtual_s = world.loop.num_callbacks, world.loop.time()
        world.loop.finish()
    faults = world.faults + world.net.faults
    return Report(seed, trace, violations, faults, world.reached, world.transitions, num_callbacks, virtual_s)


class World:
    """What the nodes share, what the nemesis does to them, and the verdict."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.mix = frozenset(kind for kind in (*STANDING, *DEALT, *USERS) if self.random.random() < 0.4)
        self.loop = SimLoop(self.random.getrandbits(64), shuffles="reorder" in self.mix)
        self.net = SimNet(self.loop)
        self.switchboard = Switchboard()
        self._wire = Wire(self.loop) if self.random.random() < 0.5 else None
        self.timeouts = TIMEOUTS
        self.names = ("a", "b", "c")
        self.nodes: dict[str, Node] = {}
        self.read_faults = self._draw_read_faults()
        self.verifies_off_loop = self.random.random() < 0.5
        self.is_ending = False
        self.violations: list[Violation] = []
        self.faults: Counter[str] = Counter(dict.fromkeys((self.mix & set(STANDING)) - {"cut"}, 1))
        self.reached: Counter[str] = Counter()
        self.transitions: Counter[str] = Counter()
        self._ids = random.Random(self.random.getrandbits(64))
        self._chains = [_chain(f"{seed}/{number}") for number in range(_CHAINS)]
        self._starts: dict[str, list[tuple[float, str]]] = {name: [] for name in self.names}
        self._record_lag_s = 5.0 if "old records" in self.mix else 0.0
        self._leases: dict[bytes, tuple[str, LeaseMachine]] = {}
        self._fetches: dict[bytes, str] = {}
        self._num_ends: Counter[tuple[str, bytes]] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._healing: list[Callable[[], None]] = []
        if "split" in self.mix:
            self.net.weather.split = 0.3
        if "cut" in self.mix:
            self.net.weather.cut = 0.3

    # ---- for the nodes ----

    def new_id(self) -> bytes:
        return self._ids.getrandbits(128).to_bytes(16, "big")

    def make_transport(self, memory: BlockMemory, seed: int) -> MemoryTransport:
        """One-sided or two-sided, the same for all nodes of a world."""
        if self._wire is not None:
            return TwoSidedTransport(memory, self.switchboard, self.read_faults, seed, self._wire)
        return MemoryTransport(memory, self.switchboard, self.read_faults, seed)

    def draw_hashes(self, draw: random.Random) -> list[BlockHash]:
        chain = draw.choice(self._chains)
        return chain[: draw.randrange(1, len(chain) + 1)]

    def record_of(self, reader: str, owner: str) -> str:
        """Which start of the owner the reader knows: the latest that is old enough, else the first."""
        known = [name for since_s, name in self._starts[owner] if since_s + self._record_lag_s <= self.loop.time()]
        return known[-1] if known else self._starts[owner][0][1]

    def carry_order(self, reader: str, owner: str, order: Order) -> None:
        """Bring an order to a prefill worker, or lose it."""
        node = self.nodes.get(owner)
        if node is None or self.net.is_blocked(reader, owner):
            self.reach("order lost")
            return
        with self.loop.within(node.process):

            async def serve() -> None:
                await node.serve(order)

            self.loop.call_later(self.random.uniform(0, 0.2), node.spawn, serve)

    def report(self, invariant: Invariant, detail: str) -> None:
        self.violations.append(Violation(invariant, f"{detail} (at {self.loop.time():.3f} s)"))

    def reach(self, what: str) -> None:
        self.reached[what] += 1

    def keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- what the machines say ----

    def saw(self, machine: FetchMachine | LeaseMachine, state: str, event: object, actions: Sequence[object]) -> None:
        is_fetch = isinstance(machine, FetchMachine)
        kind, process = "fetch" if is_fetch else "lease", self.loop.process.name
        self.transitions[f"{kind} {state} {type(event).__name__}"] += 1
        if isinstance(machine, LeaseMachine):
            self._leases[machine.transfer_id] = (process, machine)
        else:
            self._fetches[machine.transfer_id] = process
        for action in actions:
            if isinstance(action, Resolve | Quiesced | Closed):
                what = type(action).__name__, machine.transfer_id
                self._num_ends[what] += 1
                if self._num_ends[what] > 1:
                    self.report(Invariant.ONE_OUTCOME, f"{what[0]} twice, of {machine.transfer_id.hex()}")

    def check_taken(self, transfer_id: bytes, incarnation: str) -> None:
        """A reader is about to use what it has fetched."""
        owner, lease = self._leases.get(transfer_id, ("nobody", None))
        if lease is None or lease.outcome is not LeaseOutcome.CONFIRMED:
            said = lease.outcome if lease is not None else None
            self.report(Invariant.CONFIRMED, f"transfer {transfer_id.hex()} is used, its lease at {owner} is {said}")
        if owner.partition("/")[2] != incarnation:
            self.report(Invariant.SAME_INCARNATION, f"{owner} lent what incarnation {incarnation} was asked for")

    # ---- the run ----

    async def main(self) -> None:
        for name in self.names:
            self._start(name)
        await asyncio.sleep(0.5)
        for name in self.names:
            for chain in self.random.sample(self._chains, 2):
                self.nodes[name].hold(chain)
        await self._be_nemesis()
        self._stop_faults()
        await self._comes_true(lambda: not any(node.is_leaving for node in self.nodes.values()), LEAVE_S + 1.0)
        await self._see_them_serve()
        self.is_ending = True
        if not await self._comes_true(lambda: not any(node.num_busy for node in self.nodes.values()), WAIT_S):
            busy = {node.process.name: node.num_busy for node in self.nodes.values() if node.num_busy}
            self.report(Invariant.WAITS_END, f"{WAIT_S} s after the last fault users still wait: {busy}")
        closing = [self._within(node, node.exchange.close()) for node in self.nodes.values()]
        if not await self._comes_true(lambda: all(task.done() for task in closing), SERVE_S):
            self.report(Invariant.WAITS_END, f"an exchange is not closed after {SERVE_S} s")
        self._check_at_rest()

    def _check_at_rest(self) -> None:
        living = {node.process.name for node in self.nodes.values()}
        for node in self.nodes.values():
            node.pool.check_at_rest()
        wanted = [("Closed", transfer_id, process) for transfer_id, (process, _) in self._leases.items()]
        for transfer_id, process in self._fetches.items():
            wanted += [("Resolve", transfer_id, process), ("Quiesced", transfer_id, process)]
        for what, transfer_id, process in wanted:
            if process in living and self._num_ends[what, transfer_id] != 1:
                self.report(Invariant.ONE_OUTCOME, f"{process}: transfer {transfer_id.hex()} has no {what}")

    async def _see_them_serve(self) -> None:
        pairs = list(itertools.permutations(self.names, 2))
        tasks = []
        for reader, owner in pairs:
            node = self.nodes[reader]
            tasks.append(self._within(node, self._is_served(node, owner)))
        if not await self._comes_true(lambda: all(task.done() for task in tasks), SERVE_S):
            waiting = [pair for pair, task in zip(pairs, tasks, strict=True) if not task.done()]
            self.report(Invariant.SERVES_AGAIN, f"after {SERVE_S} s these got nothing (reader, owner): {waiting}")
            for task in tasks:
                task.cancel()

    async def _is_served(self, reader: Node, owner: str) -> None:
        for number in itertools.count():
            hashes = _chain(f"fresh/{reader.name}/{owner}/{number}")[:2]
            if self.nodes[owner].hold(hashes) and await reader.fetch_prefix(owner, hashes):
                return
            await asyncio.sleep(0.5)

    async def _comes_true(self, condition: Callable[[], bool], within_s: float) -> bool:
        end_s = self.loop.time() + within_s
        while not condition() and self.loop.time() < end_s:  # noqa: ASYNC110 -- the time is virtual
            await asyncio.sleep(0.25)
        return condition()

    def _within(self, node: Node, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        with self.loop.within(node.process):
            task = self.loop.create_task(work)
        self.keep(task)
        return task

    # ---- life and death of nodes ----

    def _start(self, name: str) -> None:
        starts = self._starts[name]
        incarnation = str(len(starts) + 1)
        starts.append((self.loop.time(), incarnation))
        node = Node(self, name, incarnation, self._draw_habits())
        node.threads.max_delay_s = 1.0 if "slow threads" in self.mix else 0.01
        self.nodes[name] = node
        self.net.back(name)
        self._within(node, node.start())

    def _kill(self, name: str, silently: bool) -> None:
        node = self.nodes.pop(name)
        self.loop.kill(node.process)
        self.net.kill(name, silently)
        self.switchboard.pull_out(node.transport.descriptor())

    async def _restart(self, node: Node) -> None:
        """Have a worker leave in order: its exchange closes, its users end, nothing is left; then it comes back."""
        closing = self._within(node, node.exchange.close())
        is_gone = await self._comes_true(
            lambda: node.process.is_killed or (closing.done() and not node.num_busy), LEAVE_S
        )
        if node.process.is_killed:
            return
        if is_gone:
            node.pool.check_at_rest()
            self.reach("left in order")
        else:
            self.report(Invariant.WAITS_END, f"{node.process.name} has not left after {LEAVE_S} s")
        self._kill(node.name, silently=False)
        self._start(node.name)

    def _draw_habits(self) -> Habits:
        return Habits(
            abort=0.3 if "aborts" in self.mix else 0.0,
            revoke=0.1 if "revokes" in self.mix else 0.0,
            compute_s=self.random.choice([0.05, 0.5, 2.0]),
        )

    def _draw_read_faults(self) -> Faults:
        slow, broken = "slow reads" in self.mix, "broken reads" in self.mix
        return Faults(
            max_delay_s=self.random.choice([0.1, 0.5, 2.0]) if slow else 0.002,
            stall=0.05 if broken else 0.0,
            fail=0.05 if broken else 0.0,
            cut=0.05 if broken else 0.0,
            corrupt=0.1 if "bit flips" in self.mix else 0.0,
        )

    # ---- the nemesis ----

    async def _be_nemesis(self) -> None:
        kinds = [kind for kind in DEALT if kind in self.mix]
        while self.loop.time() < LOAD_S:
            await asyncio.sleep(self.random.uniform(0, 4.0))
            if kinds:
                self._deal(self.random.choice(kinds))

    def _deal(self, kind: str) -> None:
        """Do one thing, and arrange for its end."""
        upright = [name for name, node in self.nodes.items() if not node.process.is_paused]
        if len(upright) < 2:
            return
        name = self.random.choice(upright)
        node, lasts_s = self.nodes[name], self.random.uniform(0.2, 9.0)
        self.faults[kind] += 1
        match kind:
            case "delay":
                self.net.weather.max_latency_s = self.random.choice([0.05, 0.5, 1.5])
                self._later(lasts_s, self._calm)
            case "partition":
                other = self.random.choice([each for each in self.names if each != name])
                self.net.part(name, other)
                self._later(lasts_s, lambda: self.net.join(name, other))
            case "kill" | "vanish":
                self._kill(name, silently=kind == "vanish")
                self._later(lasts_s / 3, lambda: self._start(name))
            case "restart":
                if not node.is_leaving:
                    node.is_leaving = True
                    self.keep(self.loop.create_task(self._restart(node), name=f"restart {name}"))
            case "pause":
                self.loop.pause(node.process)
                self._later(lasts_s, lambda: self.loop.resume(node.process))
            case "clock jump":
                node.process.clock_ahead_s += self.random.choice([1.0, 7.0, 100.0])
            case "rot":
                held = [node.pool.book.find(each) for each in node.pool.book.hashes()]
                if blocks := [block for block in held if block is not None]:
                    block = self.random.choice(blocks)
                    node.pool.flip(block, self.random.randrange(BLOCK_BYTES), self.random.randrange(8))
            case "full pool":
                ids = node.pool.take(node.pool.book.num_free)
                node.num_busy += 1
                self._later(lasts_s, lambda: self._make_room(node, ids))
            case "abort storm":
                for each in self.nodes.values():
                    with self.loop.within(each.process):
                        for fetch in list(each.live_fetches):
                            each.abort(fetch, "everybody left")

    def _make_room(self, node: Node, ids: Sequence[int]) -> None:
        node.num_busy -= 1
        node.pool.give_back(ids)

    def _calm(self) -> None:
        self.net.weather.max_latency_s = Weather.max_latency_s

    def _later(self, delay_s: float, end: Callable[[], None]) -> None:
        """End a fault after a while, or when all faults end."""

        def once() -> None:
            if once in self._healing:
                self._healing.remove(once)
                end()

        self._healing.append(once)
        self.loop.call_later(delay_s, once)

    def _stop_faults(self) -> None:
        for end in list(self._healing):
            end()
        self.net.weather = Weather()
        for node in self.nodes.values():
            node.transport.faults = Faults()
            node.habits = Habits()


def _chain(name: str) -> list[BlockHash]:
    return [
        BlockHash(hashlib.blake2b(f"{name}/{index}".encode(), digest_size=16).digest())
        for index in range(_CHAIN_BLOCKS)
    ]


# ---- what the run looks at in the product ----


@contextlib.contextmanager
def _watching(world: World) -> Iterator[None]:
    """See every transition of both machines, and every error that the product logs."""

    def watched(handle: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def run(machine: Any, event: object, now: float) -> list[Any]:
            state = machine.state.name
            actions = handle(machine, event, now)
            world.saw(machine, state, event, actions)
            return actions

        return run

    logger, listener = logging.getLogger("kvstore"), _LogListener(world)
    propagate, level = logger.propagate, logger.level
    logger.addHandler(listener)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    inline_bytes = BLOCK_BYTES if world.verifies_off_loop else exchange_reader._MAX_INLINE_BYTES
    try:
        with (
            mock.patch.object(FetchMachine, "handle", watched(FetchMachine.handle)),
            mock.patch.object(LeaseMachine, "handle", watched(LeaseMachine.handle)),
            mock.patch.object(exchange_reader, "_MAX_INLINE_BYTES", inline_bytes),
        ):
            yield
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate
        logger.setLevel(level)


class _LogListener(logging.Handler):
    """Errors with a traceback are ours, and so is a violation among peers that all keep the protocol."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info or "violates the block protocol" in message:
            error = record.exc_info[1] if record.exc_info else None
            self._world.report(Invariant.NO_INTERNAL_ERROR, f"{message}: {error!r}")


def all_transitions() -> set[str]:
    """Every row of both tables that may be met."""
    names = {"fetch": fetch_table.TRANSITIONS, "lease": lease_table.TRANSITIONS}
    return {
        f"{kind} {state.name} {event.__name__}"
        for kind, table in names.items()
        for state, row in table.items()
        for event, handler in row.items()
        if handler is not None
    }
