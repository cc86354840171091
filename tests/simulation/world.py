"""One run: three workers that read from each other, a nemesis, and what must hold whatever it does.

    0 s         start; clients fetch prefixes, order prompts, tell each other what they have
    .. load_s   the nemesis deals the faults that this seed has drawn (a swarm: each seed has its own mix)
    then        faults stop, the dead are restarted; within SERVE_S each worker gets a fresh block from each other one
    then        clients end, exchanges close, and everything is counted: blocks, outcomes, bytes

All randomness comes from the plan's seed. `simulate` runs one, until its first violation; equal plans give equal
traces.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from kvstore.block import BlockHash, BlockMemory
from kvstore.protocol import (
    Closed,
    ExchangeTimeouts,
    FetchMachine,
    LeaseMachine,
    LeaseOutcome,
    Quiesced,
    Resolve,
)
from tests.memory_transport import Faults, MemoryTransport, Switchboard
from tests.simulation.ledger import Ledger, Report
from tests.simulation.loop import SimLoop
from tests.simulation.nemesis import Healing, Nemesis
from tests.simulation.net import SimNet
from tests.simulation.node import Habits, Node, Order
from tests.simulation.plan import Plan
from tests.simulation.pool import Invariant
from tests.simulation.size import SIZES
from tests.simulation.transport import TwoSidedTransport, Wire
from tests.simulation.watching import watching

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


def simulate(plan: Plan) -> Report:
    """Run one plan to its verdict."""
    world = World(plan)
    with watching(world):
        return world.verdict(world.main(), END_S)


class World(Ledger):
    """What the nodes share, what the nemesis does to them, and the verdict."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.size = SIZES[plan.world]
        self.random = plan.stream("world")
        self._nemesis = Nemesis(self)
        self.mix = self._nemesis.mix
        self.loop = SimLoop(self.random.getrandbits(64), shuffles="reorder" in self.mix)
        self.healing = Healing(self.loop)
        self.net = SimNet(self.loop)
        self.switchboard = Switchboard()
        self._wire = Wire(self.loop) if self.random.random() < 0.5 else None
        self.timeouts = TIMEOUTS
        self.names = self.size.names
        self.nodes: dict[str, Node] = {}
        self.read_faults = self._draw_read_faults()
        self.verifies_off_loop = self.random.random() < 0.5
        self.is_ending = False
        self._chains = [self._chain(f"{plan.seed}/{number}") for number in range(self.size.num_chains)]
        self._starts: dict[str, list[tuple[float, str]]] = {name: [] for name in self.names}
        self._record_lag_s = 5.0 if "old records" in self.mix else 0.0
        self._leases: dict[bytes, tuple[str, LeaseMachine]] = {}
        self._fetches: dict[bytes, str] = {}
        self._num_ends: Counter[tuple[str, bytes]] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        if "split" in self.mix:
            self.net.weather.split = 0.3
        if "cut" in self.mix:
            self.net.weather.cut = 0.3

    # ---- for the nodes ----

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
                self.judge(Invariant.ONE_OUTCOME)
                if self._num_ends[what] > 1:
                    self.report(Invariant.ONE_OUTCOME, f"{what[0]} twice, of {machine.transfer_id.hex()}")

    def check_taken(self, transfer_id: bytes, incarnation: str) -> None:
        """A reader is about to use what it has fetched."""
        self.judge(Invariant.CONFIRMED)
        owner, lease = self._leases.get(transfer_id, ("nobody", None))
        if len(self._starts.get(owner.partition("/")[0], ())) > 1:
            self.judge(Invariant.SAME_INCARNATION)  # there is another that it could have been
        if lease is None or lease.outcome is not LeaseOutcome.CONFIRMED:
            said = lease.outcome if lease is not None else None
            self.report(Invariant.CONFIRMED, f"transfer {transfer_id.hex()} is used, its lease at {owner} is {said}")
        if owner.partition("/")[2] != incarnation:
            self.report(Invariant.SAME_INCARNATION, f"{owner} lent what incarnation {incarnation} was asked for")

    # ---- the run ----

    async def main(self) -> None:
        for name in self.names:
            self.start(name)
        await asyncio.sleep(0.5)
        for name in self.names:
            for chain in self.random.sample(self._chains, 2):
                self.nodes[name].hold(chain)
        await self._nemesis.deal()
        self._nemesis.stop()
        self.is_ending = not self.size.are_busy_on
        await self.comes_true(lambda: not any(node.is_leaving for node in self.nodes.values()), LEAVE_S + 1.0)
        await self._see_them_serve()
        self.is_ending = True
        self.judge(Invariant.WAITS_END)
        if not await self.comes_true(lambda: not any(node.num_busy for node in self.nodes.values()), WAIT_S):
            busy = {node.process.name: node.num_busy for node in self.nodes.values() if node.num_busy}
            self.report(Invariant.WAITS_END, f"{WAIT_S} s after the last fault users still wait: {busy}")
        closing = [self._within(node, node.exchange.close()) for node in self.nodes.values()]
        if not await self.comes_true(lambda: all(task.done() for task in closing), SERVE_S):
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
            self.judge(Invariant.SERVES_AGAIN)
            tasks.append(self._within(node, self._is_served(node, owner)))
        if not await self.comes_true(lambda: all(task.done() for task in tasks), SERVE_S):
            waiting = [pair for pair, task in zip(pairs, tasks, strict=True) if not task.done()]
            self.report(Invariant.SERVES_AGAIN, f"after {SERVE_S} s these got nothing (reader, owner): {waiting}")
            for task in tasks:
                task.cancel()

    async def _is_served(self, reader: Node, owner: str) -> None:
        for number in itertools.count():
            hashes = self._chain(f"fresh/{reader.name}/{owner}/{number}")[:2]
            if self.nodes[owner].hold(hashes) and await reader.fetch_prefix(owner, hashes):
                return
            await asyncio.sleep(0.5)

    def _within(self, node: Node, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        with self.loop.within(node.process):
            task = self.loop.create_task(work)
        self.keep(task)
        return task

    # ---- life and death of nodes ----

    def start(self, name: str) -> None:
        starts = self._starts[name]
        incarnation = str(len(starts) + 1)
        starts.append((self.loop.time(), incarnation))
        node = Node(self, name, incarnation, self._draw_habits(self.plan.stream(f"habits {name}/{incarnation}")))
        node.threads.max_delay_s = 1.0 if "slow threads" in self.mix else 0.01
        if self._nemesis.is_over:  # it was leaving when the faults ended
            self._nemesis.appease(node)
        self.nodes[name] = node
        self.net.back(name)
        self._within(node, node.start())

    def kill(self, name: str, silently: bool) -> None:
        node = self.nodes.pop(name)
        self.loop.kill(node.process)
        self.net.kill(name, silently)
        self.switchboard.pull_out(node.transport.descriptor())

    async def restart(self, node: Node) -> None:
        """Have a worker leave in order: its exchange closes, its users end, nothing is left; then it comes back."""
        closing = self._within(node, node.exchange.close())
        is_gone = await self.comes_true(
            lambda: node.process.is_killed or (closing.done() and not node.num_busy), LEAVE_S
        )
        if node.process.is_killed:
            return
        if is_gone:
            node.pool.check_at_rest()
            self.reach("left in order")
        else:
            self.report(Invariant.WAITS_END, f"{node.process.name} has not left after {LEAVE_S} s")
        self.kill(node.name, silently=False)
        self.start(node.name)

    def _draw_habits(self, draw: random.Random) -> Habits:
        return Habits(
            abort=0.3 if "aborts" in self.mix else 0.0,
            revoke=0.1 if "revokes" in self.mix else 0.0,
            compute_s=draw.choice([0.05, 0.5, 2.0]),
        )

    def _draw_read_faults(self) -> Faults:
        slow_s, broken = self.random.choice([0.1, 0.5, 2.0]), "broken reads" in self.mix
        return Faults(
            max_delay_s=slow_s if "slow reads" in self.mix else 0.002,
            stall=0.05 if broken else 0.0,
            fail=0.05 if broken else 0.0,
            cut=0.05 if broken else 0.0,
            corrupt=0.1 if "bit flips" in self.mix else 0.0,
            tell_every=3,
        )

    def _chain(self, name: str) -> list[BlockHash]:
        names = (f"{name}/{index}".encode() for index in range(self.size.chain_blocks))
        return [BlockHash(hashlib.blake2b(each, digest_size=16).digest()) for each in names]
