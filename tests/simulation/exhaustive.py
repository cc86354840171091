"""Visits every state that the two ends of a connection can reach, with so many faults; checks each.

python -m tests.simulation.exhaustive          `make simulate-exhaustive`: minutes, and gigabytes
python -m tests.simulation.exhaustive --small  what the default tests search: seconds

Breadth first, so a violation comes with one of its shortest stories. A fault is what costs one of those allowed: an
abort, a revocation, a cut, a flipped bit, a failing read or send, no room, a heartbeat more, and a deadline that passes
although something else was about to happen. Where nothing else is, deadlines pass for free.

What must happen sooner or later (messages arrive, room comes, digests are computed, aborted reads end, time passes) is
told from what may never (a worker computes, a read ends well). From every state, what must happen leads to rest: there
is no circle of it, and where nothing must happen any more, nobody holds or waits for anything.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

from kvstore.protocol import FetchMachine, LeaseMachine
from tests.simulation.joint import Broken, End, Joint, Transfer, check_fields, is_computing
from tests.simulation.watching import all_transitions
from tests.states.explore import explore
from tests.states.live import LiveModel
from tests.states.order import OrderModel
from tests.states.rows import all_rows, seeing_rows


@dataclass(frozen=True)
class Bounds:
    """What is searched."""

    transfers: tuple[Transfer, ...]
    two_sided: bool
    num_faults: int
    with_lies: bool = False
    """Whether a side may say what the protocol does not allow, as one of the faults: then the other is checked."""

    def __str__(self) -> str:
        kinds = " + ".join(f"{each.num_blocks} {'wanted' if each.is_wanted else 'ordered'}" for each in self.transfers)
        return (
            f"{kinds}, {'two' if self.two_sided else 'one'}-sided, {self.num_faults} faults{', lies' * self.with_lies}"
        )


STATES: Final = Path("build/simulation/states.txt")
"""What the last search that came to its end has seen."""

_ORDERED, _WANTED, _LONG = Transfer(0, 2), Transfer(1, 1, is_wanted=True), Transfer(0, 3)
SMALL: Final = (
    Bounds((_ORDERED,), two_sided=False, num_faults=1),
    Bounds((_WANTED,), two_sided=False, num_faults=2),
    Bounds((_WANTED,), two_sided=True, num_faults=2),
    Bounds((_ORDERED,), two_sided=True, num_faults=1, with_lies=True),
)
LARGE: Final = (
    Bounds((_ORDERED, _WANTED), two_sided=False, num_faults=1),
    Bounds((_ORDERED, _WANTED), two_sided=True, num_faults=1),
    Bounds((_ORDERED, _WANTED), two_sided=False, num_faults=2),
    Bounds((_LONG,), two_sided=False, num_faults=2),
    Bounds((_LONG,), two_sided=True, num_faults=2),
    Bounds((_ORDERED,), two_sided=True, num_faults=2, with_lies=True),
)


class Step(NamedTuple):
    """Something that may happen in a state. `must`: sooner or later it does, unless something else has."""

    method: str
    arguments: tuple[Any, ...] = ()
    must: bool = True
    cost: int = 0


@dataclass
class Findings:
    """What a search has seen."""

    num_states: int = 0
    num_steps: int = 0
    num_rests: int = 0
    met: Counter[str] = field(default_factory=Counter)
    """Table entries, `machine STATE Event`."""
    violation: str = ""
    story: tuple[str, ...] = ()


def search(bounds: Bounds, max_states: int = 10_000_000) -> Findings:
    """Visit all states, until the first violation."""
    found = Findings()
    with _noting(found.met):
        _Search(bounds, found, max_states).run()
    return found


def steps_of(joint: Joint, with_lies: bool = False) -> list[Step]:
    """All that may happen in a state."""
    steps = [*_of_wire(joint), *_of_reader(joint), *_of_owner(joint)]
    is_busy = any(step.must and not step.cost for step in steps)
    steps += _deadlines(joint, int(is_busy))
    if with_lies and joint.reader_end is End.UP and joint.owner_end is End.UP:
        steps += _lies(joint)
    return [step for step in steps if step.cost <= joint.faults_left]


def _of_wire(joint: Joint) -> Iterator[Step]:
    if joint.to_reader and joint.reader_end is not End.LOST:
        yield Step("receive_at_reader")
    if joint.to_owner and joint.owner_end is not End.LOST:
        yield Step("receive_at_owner")
    if joint.reader_end is End.BROKEN:
        yield Step("lose_reader")
    if joint.owner_end is End.BROKEN:
        yield Step("lose_owner")
    # Who is gone has closed the connection; that comes after all it has said.
    if joint.owner_end is End.LOST and joint.reader_end is End.UP and not joint.to_reader:
        yield Step("reader_hears_the_end")
    if joint.reader_end is End.LOST and joint.owner_end is End.UP and not joint.to_owner:
        yield Step("owner_hears_the_end")
    if joint.reader_end is End.UP and joint.owner_end is End.UP:
        yield Step("cut", must=False, cost=1)


def _of_reader(joint: Joint) -> Iterator[Step]:
    for transfer_id in sorted(joint.rooms):
        for num_present in range(joint.transfers[transfer_id].num_blocks):
            yield Step("grant_room", (transfer_id, num_present))
        yield Step("refuse_room", (transfer_id,), must=False, cost=1)
    for read_id in sorted(joint.verifying):
        yield Step("verify", (read_id,))
    for read_id in sorted(joint.link):
        is_aborted = joint.reader_end is End.LOST
        is_orphan = joint.owner_end is End.LOST
        if not is_aborted and not (joint.two_sided and read_id not in joint.sends):
            yield Step("end_read", (read_id,), must=False)
            yield Step("end_read_flipped", (read_id,), must=False, cost=1)
        yield Step("fail_read", (read_id,), must=is_aborted, cost=0 if is_aborted or is_orphan else 1)
    for transfer_id in joint.reader.transfers:
        yield Step("abort", (transfer_id,), must=False, cost=1)
    if joint.reader_end is End.UP and joint.owner_end is End.UP:
        yield Step("beat", must=False, cost=1)


def _of_owner(joint: Joint) -> Iterator[Step]:
    for transfer_id in sorted(joint.wants):
        for num_blocks in {0, joint.transfers[transfer_id].num_blocks, joint.transfers[transfer_id].num_blocks - 1}:
            yield Step("lend", (transfer_id, num_blocks))
    for read_id in sorted(joint.sends):
        if read_id in joint.ended_reads or joint.owner_end is End.LOST:
            yield Step("end_send", (read_id,))
        else:
            yield Step("fail_send", (read_id,), must=False, cost=1)
    for transfer_id, transfer in joint.transfers.items():
        if not transfer.is_wanted and transfer_id not in joint.opened and joint.owner_end is End.UP:
            yield Step("open", (transfer_id,), must=False)
    for transfer_id, lease in joint.owner.transfers.items():
        if not joint.transfers[transfer_id].is_wanted and is_computing(lease):
            for num_blocks in range(1, lease.num_blocks - len(lease.blocks) + 1):
                yield Step("compute", (transfer_id, num_blocks), must=False)
        yield Step("revoke", (transfer_id,), must=False, cost=1)


def _deadlines(joint: Joint, cost: int) -> Iterator[Step]:
    for transfer_id, fetch in joint.reader.transfers.items():
        if fetch.next_deadline is not None:
            yield Step("time_reader_out", (transfer_id,), cost=cost)
    for transfer_id, lease in joint.owner.transfers.items():
        if lease.next_deadline is not None:
            yield Step("time_owner_out", (transfer_id,), cost=cost)


def _lies(joint: Joint) -> Iterator[Step]:
    for transfer_id in joint.transfers:
        if joint.liar != "reader":
            for lie in ("offer", "offer of more", "announcement", "other hash", "confirmation"):
                yield Step("lie_to_reader", (transfer_id, lie), must=False, cost=1)
        if joint.liar != "owner":
            for lie in ("confirm", "read", "release"):
                yield Step("lie_to_owner", (transfer_id, lie), must=False, cost=1)


class _Search:
    def __init__(self, bounds: Bounds, found: Findings, max_states: int) -> None:
        self._bounds = bounds
        self._found = found
        self._max_states = max_states
        self._numbers: dict[bytes, int] = {}
        self._parents = array("q")  # of each state but the first, and the step that led from there
        self._labels: dict[tuple[str, tuple[Any, ...]], int] = {}
        self._steps = array("q")
        self._must_from, self._must_to = array("q"), array("q")

    def run(self) -> None:
        start = Joint(self._bounds.transfers, self._bounds.two_sided, self._bounds.num_faults)
        check_fields(start)
        self._note(start.key(), -1, Step("start"))
        waiting = deque([start])
        try:
            while waiting:
                self._visit(self._found.num_states, waiting.popleft(), waiting)
                self._found.num_states += 1
            self._check_progress()
        except Broken as error:
            self._found.violation = str(error)

    def _visit(self, number: int, joint: Joint, waiting: deque[Joint]) -> None:
        steps = steps_of(joint, self._bounds.with_lies)
        if not any(step.must for step in steps):
            self._found.num_rests += 1
            if why := joint.why_not_at_rest():
                self._fail(number, None, f"nothing must happen any more, and this is left: {why}")
        for step in steps:
            after = joint.copy()
            after.faults_left -= step.cost
            try:
                getattr(after, step.method)(*step.arguments)
            except Exception as error:
                self._fail(number, step, f"{type(error).__name__}: {error}")
            self._found.num_steps += 1
            key = after.key()
            if key not in self._numbers:
                if len(self._numbers) >= self._max_states:
                    raise Broken(f"more than {self._max_states} states")
                check_fields(after)
                self._note(key, number, step)
                waiting.append(after)
            if step.must:
                self._must_from.append(number)
                self._must_to.append(self._numbers[key])

    def _note(self, key: bytes, parent: int, step: Step) -> None:
        self._numbers[key] = len(self._numbers)
        self._parents.append(parent)
        label = step.method, step.arguments
        self._steps.append(self._labels.setdefault(label, len(self._labels)))

    def _fail(self, number: int, step: Step | None, what: str) -> None:
        story = [] if step is None else [_words(step.method, step.arguments)]
        labels = list(self._labels)
        while self._parents[number] >= 0:
            story.append(_words(*labels[self._steps[number]]))
            number = self._parents[number]
        self._found.story = tuple(reversed(story))
        raise Broken(what)

    def _check_progress(self) -> None:
        """What must happen goes in no circle: then each way along it ends, and where it ends, all is at rest."""
        num_into = array("q", bytes(8 * len(self._numbers)))
        leads_to: dict[int, list[int]] = {}
        for source, target in zip(self._must_from, self._must_to, strict=True):
            num_into[target] += 1
            leads_to.setdefault(source, []).append(target)
        ready = [number for number, count in enumerate(num_into) if not count]
        num_sorted = 0
        while ready:
            number = ready.pop()
            num_sorted += 1
            for target in leads_to.get(number, ()):
                num_into[target] -= 1
                if not num_into[target]:
                    ready.append(target)
        if num_sorted < len(num_into):
            number = next(number for number, count in enumerate(num_into) if count)
            self._fail(number, None, "what must happen goes in a circle")


def _words(method: str, arguments: Sequence[Any]) -> str:
    named = (each.decode() if isinstance(each, bytes) else str(each) for each in arguments)
    return f"{method}({', '.join(named)})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.exhaustive")
    parser.add_argument("--small", action="store_true", help="what the default tests search")
    searches = SMALL if parser.parse_args().small else (*SMALL, *LARGE)
    num_states, met = 0, set[str]()
    for bounds in searches:
        start_s = time.monotonic()
        found = search(bounds)
        num_states += found.num_states
        met |= set(found.met)
        took = f"{time.monotonic() - start_s:.0f} s"
        print(f"{bounds}: {found.num_states:,} states, {found.num_steps:,} steps, {took}", flush=True)
        if found.violation:
            print("  " + "\n  ".join((*found.story, found.violation)))
            return 1
    said = f"{num_states:,} states in all, {len(met)} of {len(all_transitions())} entries of the two tables"
    print(said)
    STATES.parent.mkdir(parents=True, exist_ok=True)
    STATES.write_text(said, encoding="utf-8")
    return max(_search_worker(model) for model in (OrderModel(), LiveModel()))


def _search_worker(model: OrderModel | LiveModel) -> int:
    """The tables of the workers, each alone."""
    rows: set[str] = set()
    with seeing_rows(rows.add):
        found = explore(model)
    table = type(model).__name__.removesuffix("Model").lower()
    num_rows = sum(row.startswith(table) for row in all_rows())
    print(f"{table}: {found.num_states:,} states, {found.num_steps:,} steps, {len(rows)} of {num_rows} entries")
    if found.violation:
        print("  " + "\n  ".join((*found.story, found.violation)))
    return 1 if found.violation else 0


@contextlib.contextmanager
def _noting(met: Counter[str]) -> Iterator[None]:
    """Count the table entries that are met."""

    def noted(kind: str, handle: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def run(machine: Any, event: object, now: float) -> list[Any]:
            met[f"{kind} {machine.state.name} {type(event).__name__}"] += 1
            return handle(machine, event, now)

        return run

    with (
        mock.patch.object(FetchMachine, "handle", noted("fetch", FetchMachine.handle)),
        mock.patch.object(LeaseMachine, "handle", noted("lease", LeaseMachine.handle)),
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
