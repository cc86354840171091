"""What is done to the fleet: one fault after the other, never to both workers of a role at once.

| fault | who | what |
|---|---|---|
| kill | any process | SIGKILL; started again a moment later; Redis comes back empty |
| terminate | workers, store, routers | SIGTERM: it drains; started again when it has ended |
| stop | any process | SIGSTOP for a quarter to three times the silence after which the others leave it |
| cut | any process | its network passes nothing for as long; nobody is told; needs namespaces |
| flush | Redis | is emptied |

The next fault is dealt when all serve again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from tests.chaos import network
from tests.chaos.fleet import TIMEOUT_S, Fleet, Member

_FAULTS: Final = (
    ("kill", "decode", 4),
    ("kill", "prefill", 2),
    ("kill", "store", 1),
    ("kill", "router", 1),
    ("kill", "redis", 1),
    ("terminate", "decode", 2),
    ("terminate", "prefill", 1),
    ("terminate", "store", 1),
    ("terminate", "router", 1),
    ("stop", "decode", 3),
    ("stop", "prefill", 2),
    ("stop", "store", 1),
    ("stop", "router", 1),
    ("stop", "redis", 1),
    ("cut", "decode", 3),
    ("cut", "prefill", 2),
    ("cut", "store", 1),
    ("cut", "router", 1),
    ("cut", "redis", 1),
    ("flush", "redis", 1),
)
"""Each with its weight."""
_DRAIN_S: Final = 60.0


@dataclass
class Nemesis:
    """Draws faults from a seed. `spans`: when each began and was over, monotonic.

    `only_restarts`: no stops, cuts and flushes, and no rest between two faults.
    """

    fleet: Fleet
    seed: int
    only_restarts: bool = False
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    recoveries: list[tuple[str, float, str]] = field(default_factory=list)
    """After each fault: seconds until all served again, and who was the last."""
    unexpected: list[str] = field(default_factory=list)

    @property
    def dealt(self) -> Counter[str]:
        """How many of each."""
        return Counter(name for name, *_ in self.spans)

    async def run(self, seconds: float, most: float) -> None:
        """Deal faults for so long, or so many; return when all that was broken serves again. Raises TimeoutError."""
        random_ = random.Random(self.seed)
        known = [each for each in _FAULTS if self._is_dealt(each[0])]
        end = time.monotonic() + seconds
        while time.monotonic() < end and len(self.spans) < most:
            await asyncio.sleep(0 if self.only_restarts else random_.uniform(0.3, 3.0))
            kind, role, _ = random_.choices(known, [weight for *_, weight in known])[0]
            member = random_.choice(self.fleet.of_role(role))
            duration = random_.uniform(0.25, 3) * TIMEOUT_S * self.fleet.patience
            began = time.monotonic()
            await self._deal(member, kind, duration)
            over = time.monotonic()
            last = await asyncio.to_thread(self.fleet.wait_ready, self._start_again)
            self.spans.append((f"{kind} {role}", began, time.monotonic()))
            self.recoveries.append((f"{kind} {role}", time.monotonic() - over, last))

    def _is_dealt(self, kind: str) -> bool:
        if self.only_restarts:
            return kind in ("kill", "terminate")
        return kind != "cut" or self.fleet.with_networks

    async def _deal(self, member: Member, kind: str, duration: float) -> None:
        match kind:
            case "flush":
                await asyncio.to_thread(self.fleet.flush_redis)
            case "kill":
                self.fleet.end(member, signal.SIGKILL)
                await asyncio.sleep(0 if self.only_restarts else duration / 2)
            case "terminate":
                await self._terminate(member)
            case "stop":
                with member.gone():
                    os.kill(member.pid, signal.SIGSTOP)
                    await asyncio.sleep(duration)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(member.pid, signal.SIGCONT)
            case _:
                with member.gone():
                    await asyncio.to_thread(network.cut, member.index)
                    await asyncio.sleep(duration)
                    if member.alive:
                        await asyncio.to_thread(network.heal, member.index)

    async def _terminate(self, member: Member) -> None:
        self.fleet.end(member, signal.SIGTERM)
        assert member.process is not None
        patience = _DRAIN_S * self.fleet.patience
        await asyncio.to_thread(member.process.join, patience)
        if member.alive:
            self.unexpected.append(f"{member.name} did not leave within {patience:g} s of SIGTERM")
            self.fleet.end(member, signal.SIGKILL)
        elif member.process.exitcode != 0:
            self.unexpected.append(f"{member.name} left with status {member.process.exitcode} after SIGTERM")

    def _start_again(self) -> None:
        """Whoever has ended; say of whom it was not expected."""
        for member in self.fleet.members.values():
            if not member.alive:
                assert member.process is not None
                member.process.join()
                if member.process.exitcode not in (0, -signal.SIGKILL):
                    self.unexpected.append(f"{member.name} ended with status {member.process.exitcode}")
                member.ends.append(time.monotonic())
                self.fleet.start(member)
