"""Both state machines against each other under hundreds of random schedules: delays, cuts, freezes, aborts, corruption.

Time is virtual and everything follows from the seed. Blocks hold one integer each, its own digest; a block that
is given back is overwritten at once by "somebody else", so that every use after its end shows.
"""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest

from kvstore.block import BlockHash, coalesce
from kvstore.protocol import AbortOrdered, ExchangeTimeouts, FetchMachine, HangUp, PeerGone
from kvstore.protocol import fetch_events as f
from kvstore.protocol import lease as le
from kvstore.protocol import messages as m
from kvstore.protocol.machine import Timer

TIMEOUTS = ExchangeTimeouts(
    heartbeat_s=1.0,
    peer_timeout_s=4.0,
    lease_ttl_s=5.0,
    lease_max_s=60.0,
    offer_s=20.0,
    reserve_s=10.0,
    announce_s=8.0,
    read_s=4.0,
    confirm_s=3.0,
    drain_s=3.0,
)
TRANSFER = b"simulated-fetch!"
NUM_POOL_BLOCKS = 32
END_S = 300.0


class World:
    """One transfer between two workers, and whatever the seed does to it."""

    def __init__(self, seed: int, two_sided: bool) -> None:
        self.random = random.Random(seed)
        self.two_sided = two_sided
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        draw = self.random.random
        # how bad this world is
        self.latency_s = self.random.choice([0.001, 0.1, 1.0])
        self.read_s = self.random.choice([0.01, 0.5, 3.0])
        self.p_corrupt = self.random.choice([0, 0, 0.1])
        self.p_read_fails = self.random.choice([0, 0, 0.2])
        self.p_read_hangs = self.random.choice([0, 0, 0.2])
        # the pools
        self.num_blocks = self.random.randrange(1, 13)
        ids = range(NUM_POOL_BLOCKS)
        self.source, self.target = self.random.sample(ids, self.num_blocks), self.random.sample(ids, self.num_blocks)
        self.owner_pool = {i: self.random.getrandbits(64) for i in ids}
        self.reader_pool = {i: self.random.getrandbits(64) for i in ids}
        self.truth = [self.owner_pool[i] for i in self.source]
        self.owner_holds, self.reader_holds = set(self.source), set[int]()
        self.hashes = [BlockHash(i.to_bytes(16, "big")) for i in range(self.num_blocks)]
        self.num_present = self.random.choice([0, 0, self.random.randrange(self.num_blocks + 1)])
        # outcomes
        self.results: list[f.FetchResult] = []
        self.quiesced: list[list[int]] = []
        self.outcomes: list[le.LeaseOutcome] = []
        # the link and the connection
        self.reads: dict[int, tuple[f.StartRead, list]] = {}  # going on in the transport
        self.ungranted: dict[int, f.StartRead] = {}
        self.sends: set[int] = set()
        self.cut = {"reader": False, "owner": False}  # who has noticed
        self.broken = False
        self.last_arrival = {"reader": 0.0, "owner": 0.0}
        self.frozen_until = {"reader": 0.0, "owner": 0.0}
        self.fetch = FetchMachine(
            TRANSFER,
            self.hashes,
            8,
            TIMEOUTS,
            itertools.count(1).__next__,
            0.0,
            f.ReadLimits(self.random.randrange(1, 4), self.random.randrange(1, 5)),
        )
        self.lease: le.LeaseMachine | None = None
        self.at(self.random.uniform(0, 3 if draw() < 0.9 else 30), self.open_lease)
        self.at(1.0, self.beat)
        if draw() < 0.25:
            self.at(self.random.uniform(0, 15), lambda: self.tell_fetch(AbortOrdered("the client left")))
        if draw() < 0.15:
            self.at(self.random.uniform(0, 15), lambda: self.tell_lease(AbortOrdered("aborted")))
        if draw() < 0.25:
            self.at(self.random.uniform(0, 15), self.break_connection)
        if draw() < 0.25:
            side, end = self.random.choice(["reader", "owner"]), self.random.uniform(0, 10)
            self.at(end, lambda: self.frozen_until.update({side: self.now + self.random.uniform(0, 12)}))
        self.rearm()

    # ---- time ----

    def at(self, delay: float, what: Callable[[], None], side: str | None = None) -> None:
        def when_awake() -> None:
            if side is not None and self.frozen_until[side] > self.now:
                self.at(self.frozen_until[side] - self.now, what, side)
            else:
                what()

        heapq.heappush(self.events, (self.now + delay, next(self.order), when_awake))

    def run(self) -> None:
        while self.events and self.now < END_S:
            self.now, _, what = heapq.heappop(self.events)
            what()

    def rearm(self) -> None:
        """Timers fire at or after their deadline; superfluous ones are harmless."""
        for machine, tell, timer, side in (
            (self.fetch, self.tell_fetch, Timer(), "reader"),
            (self.lease, self.tell_lease, Timer(), "owner"),
        ):
            deadline = machine.next_deadline if machine is not None else None
            if deadline is not None:
                self.at(max(0.0, deadline - self.now), lambda tell=tell, timer=timer: tell(timer), side)

    # ---- the wire ----

    def send(self, to: str, message: m.Message) -> None:
        """TCP: in order, after some time, or never once the connection is broken."""
        arrival = max(self.last_arrival[to], self.now + self.random.uniform(0, self.latency_s))
        self.last_arrival[to] = arrival
        self.at(arrival - self.now, lambda: None if self.cut[to] or self.broken else self.receive(to, message), to)

    def receive(self, side: str, message: m.Message) -> None:
        body = m.encode(message)[m.LENGTH_BYTES :]
        match m.decode(body):
            case m.ReadGranted(read_id):
                self.start_transport(self.ungranted.pop(read_id))
            case m.ReadRefused(read_id, reason):
                del self.ungranted[read_id]
                self.tell_fetch(f.ReadEnded(read_id, f.FetchCause.REFUSED, reason))
            case heard if side == "reader":
                self.tell_fetch(heard)
            case m.Suspect():
                pass
            case heard:
                self.tell_lease(heard)

    def beat(self) -> None:
        if not self.results and not self.cut["reader"]:
            self.at(0, lambda: self.send("owner", m.Heartbeat([TRANSFER])), "reader")
            self.at(1.0, self.beat)

    def break_connection(self) -> None:
        if self.broken:
            return
        self.broken = True
        for side in ("reader", "owner"):
            self.at(self.random.uniform(0, TIMEOUTS.peer_timeout_s + 1), lambda side=side: self.notice(side), side)

    def notice(self, side: str) -> None:
        """The shell's teardown: tell the machine, then abort the link and wait for what is under way."""
        self.cut[side] = True
        if side == "owner":
            self.tell_lease(PeerGone("cut"))
            for read_id in list(self.sends):
                self.at(self.random.uniform(0, 1), lambda read_id=read_id: self.end_send(read_id))
            return
        self.tell_fetch(PeerGone("cut"))
        ungranted, self.ungranted = self.ungranted, {}
        for read_id in ungranted:
            self.tell_fetch(f.ReadEnded(read_id, f.FetchCause.PEER_LOST, "cut"))
        for read_id in list(self.reads):
            self.at(self.random.uniform(0, 1), lambda read_id=read_id: self.end_read(read_id, "aborted"))

    # ---- the owner ----

    def open_lease(self) -> None:
        if self.cut["owner"] or self.broken:
            self.give_back_source()
            self.outcomes.append(le.LeaseOutcome.PEER_LOST)
            return
        self.lease = le.LeaseMachine(TRANSFER, self.num_blocks, TIMEOUTS, self.now)
        self.do_lease(self.lease.open())
        self.at(self.random.uniform(0, 2), lambda: self.compute(0), "owner")

    def compute(self, first: int) -> None:
        """The next chunk is computed; sometimes the owner's compute hangs instead."""
        if self.random.random() < 0.03:
            return
        end = min(self.num_blocks, first + self.random.randrange(1, 6))
        wrong = self.random.random() < 0.02
        blocks = [
            m.AnnouncedBlock(self.source[i], self.hashes[i - 1 if wrong else i], self.truth[i])
            for i in range(first, end)
        ]
        self.tell_lease(le.BlocksComputed(first, blocks, end == self.num_blocks))
        if end < self.num_blocks:
            self.at(self.random.uniform(0, 2), lambda: self.compute(end), "owner")

    def tell_lease(self, event: le.LeaseEvent) -> None:
        if self.lease is not None:
            self.do_lease(self.lease.handle(event, self.now))
            self.rearm()

    def do_lease(self, actions: list[le.LeaseAction]) -> None:
        for action in actions:
            match action:
                case le.StartSend(read_id, _):
                    self.sends.add(read_id)
                    if self.cut["owner"]:
                        self.at(0, lambda read_id=read_id: self.end_send(read_id))
                case HangUp():
                    self.break_connection()
                case le.Closed(outcome):
                    assert not self.sends, "a lease has closed while blocks of it are being sent"
                    self.outcomes.append(outcome)
                    self.give_back_source()
                case message:
                    self.send("reader", message)

    def give_back_source(self) -> None:
        self.owner_holds.clear()
        for block_id in self.source:
            self.owner_pool[block_id] = self.random.getrandbits(64)  # computed anew for another request

    def end_send(self, read_id: int) -> None:
        if read_id in self.sends:
            self.sends.remove(read_id)
            self.tell_lease(le.SendEnded(read_id))

    # ---- the reader ----

    def tell_fetch(self, event: f.FetchEvent) -> None:
        self.do_fetch(self.fetch.handle(event, self.now))
        self.rearm()

    def do_fetch(self, actions: list[f.FetchAction]) -> None:
        for action in actions:
            match action:
                case f.Reserve():
                    self.at(self.random.choice([0, 0.5, 4, 14]) * self.random.random(), self.grant_room, "reader")
                case f.StartRead():
                    self.start_read(action)
                case f.Verify(read_id, local_ids, proofs):
                    self.at(
                        self.random.uniform(0, 0.2),
                        lambda read_id=read_id, local_ids=local_ids, proofs=proofs: self.tell_fetch(
                            f.Verified(
                                read_id, [n for n, i in enumerate(local_ids) if self.reader_pool[i] != proofs[n]]
                            )
                        ),
                        "reader",
                    )
                case HangUp():
                    self.break_connection()
                case f.Resolve(result):
                    self.results.append(result)
                case f.Quiesced(block_ids):
                    assert not self.reads, "quiesced while a read goes on"
                    self.quiesced.append(block_ids)
                    self.give_back_target(block_ids)
                case message:
                    self.send("owner", message)

    def grant_room(self) -> None:
        if self.random.random() < 0.05:
            self.tell_fetch(f.ReserveFailed("no room"))
            return
        self.reader_holds = set(self.target)
        for i in range(self.num_present):
            self.reader_pool[self.target[i]] = self.truth[i]
        self.tell_fetch(f.Reserved(f.Reservation(self.target, self.num_present)))

    def give_back_target(self, block_ids: list[int]) -> None:
        for block_id in block_ids:
            self.reader_holds.remove(block_id)
            self.reader_pool[block_id] = -1 - block_id  # somebody else's now; see the check at the end

    def start_read(self, action: f.StartRead) -> None:
        if self.cut["reader"]:
            self.at(0, lambda: self.tell_fetch(f.ReadEnded(action.read_id, f.FetchCause.PEER_LOST, "cut")))
        elif self.two_sided:
            self.ungranted[action.read_id] = action
            position, runs = action.indexes[0], []
            for run in coalesce(action.remote_ids, action.local_ids, 3):
                runs.append((position, run.num_blocks))
                position += run.num_blocks
            self.send("owner", m.ReadRequest(action.read_id, TRANSFER, runs))
        else:
            self.start_transport(action)

    def start_transport(self, action: f.StartRead) -> None:
        blocks = list(zip(action.remote_ids, action.local_ids, strict=True))
        self.random.shuffle(blocks)
        self.reads[action.read_id] = (action, blocks)
        if self.random.random() >= self.p_read_hangs:
            self.at(self.random.uniform(0, self.read_s), lambda: self.move_block(action.read_id))
        # else: it goes on until the link is aborted

    def move_block(self, read_id: int) -> None:
        """One more block of a read lands, whatever has become of the fetch."""
        if read_id not in self.reads:
            return
        _, blocks = self.reads[read_id]
        if not blocks:
            self.end_read(read_id, "failed" if self.random.random() < self.p_read_fails else None)
            return
        remote_id, local_id = blocks.pop()
        assert local_id in self.reader_holds, "a late byte has landed in somebody else's block"
        corrupt = self.random.random() < self.p_corrupt
        self.reader_pool[local_id] = self.owner_pool[remote_id] ^ (1 << self.random.randrange(64) if corrupt else 0)
        self.at(self.random.uniform(0, self.read_s / 4), lambda: self.move_block(read_id))

    def end_read(self, read_id: int, problem: str | None) -> None:
        if self.reads.pop(read_id, None) is None:
            return
        self.end_send(read_id)
        cause = None if problem is None else f.FetchCause.READ_FAILED
        self.tell_fetch(f.ReadEnded(read_id, cause, problem or ""))
        if problem == "failed":
            self.break_connection()

    # ---- the verdict ----

    def check(self) -> str:
        assert self.now < END_S, "the world has not come to rest"
        assert len(self.results) == 1
        assert len(self.quiesced) == 1
        assert len(self.outcomes) == 1
        assert self.owner_holds == set()
        assert not self.reads
        assert not self.sends
        result = self.results[0]
        if result.ok:
            assert result.block_ids == self.target
            assert [self.reader_pool[i] for i in self.target] == self.truth
            assert self.outcomes == [le.LeaseOutcome.CONFIRMED]
            assert self.quiesced == [[]]
            assert result.num_blocks == self.num_blocks - self.num_present
            return "ok"
        assert self.reader_holds == set()
        returned = self.quiesced[0]
        assert [self.reader_pool[i] for i in returned] == [-1 - i for i in returned], "written after it was given back"
        assert result.failure is not None
        return result.failure.cause.value


@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
def test_whatever_happens_a_good_result_has_the_owners_bytes_and_every_block_comes_home(two_sided: bool):
    verdicts: Counter[str] = Counter()
    for seed in range(800):
        world = World(seed, two_sided)
        try:
            world.run()
            verdicts[world.check()] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, two_sided={two_sided}: {error}") from error
    # The schedules reach what they are there to reach.
    assert verdicts["ok"] > 150
    expected = {"aborted", "peer_lost", "timeout", "revoked", "reserve_failed", "read_failed", "hash", "digest"}
    assert expected <= verdicts.keys(), verdicts
