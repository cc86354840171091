"""What every world writes down of its run, and the report that comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.simulation.loop import SimLoop, Stopped, Stuck
from tests.simulation.net import SimNet
from tests.simulation.plan import Plan
from tests.simulation.pool import Invariant, Violation


@dataclass(frozen=True)
class Report:
    """What a run has shown."""

    plan: Plan
    trace: str
    violations: tuple[Violation, ...]
    """The first of all, and what came at the same moment."""
    parts: tuple[str, ...]
    """Of the schedule: all that was asked for, in order."""
    story: tuple[str, ...]
    """What the nemesis did."""
    faults: Counter[str]
    reached: Counter[str]
    transitions: Counter[str]
    num_callbacks: int
    virtual_s: float


class Ledger:
    """A world's base. A world makes `loop` and `net`."""

    loop: SimLoop
    net: SimNet

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.parts: dict[str, None] = {}
        self.story: list[str] = []
        self.violations: list[Violation] = []
        self.faults: Counter[str] = Counter()
        self.reached: Counter[str] = Counter()
        self.transitions: Counter[str] = Counter()
        self._ids = plan.stream("ids")

    def does(self, part: str) -> bool:
        """Note that the schedule has this part; whether it happens."""
        self.parts[part] = None
        return self.plan.has(part)

    def new_id(self) -> bytes:
        return self._ids.getrandbits(128).to_bytes(16, "big")

    def report(self, invariant: Invariant, detail: str) -> None:
        self.violations.append(Violation(invariant, f"{detail} (at {self.loop.time():.3f} s)"))
        self.loop.stop()

    def reach(self, what: str) -> None:
        self.reached[what] += 1

    def judge(self, invariant: Invariant) -> None:
        """Note that an invariant could have been broken here."""
        self.reached[f"judged {invariant.name}"] += 1

    async def comes_true(self, condition: Callable[[], bool], within_s: float) -> bool:
        end_s = self.loop.time() + within_s
        while not condition() and self.loop.time() < end_s:  # noqa: ASYNC110 -- the time is virtual
            await asyncio.sleep(0.25)
        return condition()

    def verdict(self, run: Coroutine[Any, Any, None], end_s: float) -> Report:
        """Run it, for `end_s` of virtual time at most."""
        try:
            self.loop.run(run, end_s)
        except Stuck as error:
            self.report(Invariant.WAITS_END, str(error))
        except Stopped:
            pass  # a violation is noted
        for context in self.loop.errors:
            self.report(Invariant.NO_INTERNAL_ERROR, f"{context.get('message')}: {context.get('exception')!r}")
        report = Report(
            plan=self.plan,
            trace=self.loop.trace,
            violations=tuple(self.violations),
            parts=tuple(self.parts),
            story=tuple(self.story),
            faults=self.faults + self.net.faults,
            reached=self.reached,
            transitions=self.transitions,
            num_callbacks=self.loop.num_callbacks,
            virtual_s=self.loop.time(),
        )
        self.net.finish()
        self.loop.finish()
        return report


@contextlib.contextmanager
def listening(ledger: Ledger, names: Sequence[str], hear: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Hear what these loggers of the product say from warnings on; nobody else does. `hear`: what is no violation."""
    listener = _Listener(ledger, hear)
    with contextlib.ExitStack() as stack:
        for name in names:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            stack.callback(setattr, logger, "propagate", logger.propagate)
            stack.callback(logger.removeHandler, listener)
            logger.addHandler(listener)
            logger.propagate = False
            logger.setLevel(logging.WARNING)
        yield


class _Listener(logging.Handler):
    """Errors with a traceback are ours, and so is a violation among peers that all keep the protocol."""

    def __init__(self, ledger: Ledger, hear: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._ledger = ledger
        self._hear = hear

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.exc_info or "violates the block protocol" in message:
            error = record.exc_info[1] if record.exc_info else None
            self._ledger.report(Invariant.NO_INTERNAL_ERROR, f"{message}: {error!r}")
        else:
            self._hear(message)
