"""What is done to the fleet: one fault after the other, never to both workers of a role at once.

| fault | who | what |
|---|---|---|
| kill | any process | SIGKILL; started again within three seconds |
| terminate | any process | SIGTERM: it drains; started again when it has ended |
| stop | workers, store | SIGSTOP for one to six seconds |
| cut | workers, store | its network passes nothing for one to six seconds; needs namespaces |
| redis kill, stop, flush | Redis | comes back empty; answers nobody for one to four seconds; is emptied |
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
from tests.chaos.fleet import READY_TIMEOUT_S, Fleet, Member

_WORKERS: Final = ("prefill", "decode", "store")
_FAULTS: Final = (
    ("kill", "decode", 4),
    ("kill", "prefill", 2),
    ("kill", "store", 1),
    ("kill", "router", 1),
    ("terminate", "decode", 2),
    ("terminate", "prefill", 1),
    ("terminate", "router", 1),
    ("stop", "decode", 3),
    ("stop", "prefill", 2),
    ("stop", "store", 1),
    ("cut", "decode", 3),
    ("cut", "prefill", 2),
    ("cut", "store", 1),
    ("kill", "redis", 1),
    ("stop", "redis", 1),
    ("flush", "redis", 1),
)
_DRAIN_S: Final = 60.0


@dataclass
class Nemesis:
    """Draws faults from a seed. `dealt`: how many of each; `spans`: when each began and was over, monotonic."""

    fleet: Fleet
    seed: int
    dealt: Counter[str] = field(default_factory=Counter)
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    recoveries: list[tuple[str, float, str]] = field(default_factory=list)
    """After each fault: seconds until all served again, and who was the last."""
    unexpected: list[str] = field(default_factory=list)

    async def run(self, seconds: float) -> None:
        """Deal faults for so long; return when all that was broken serves again."""
        random_ = random.Random(self.seed)
        known = [each for each in _FAULTS if each[0] != "cut" or self.fleet.with_networks]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(random_.uniform(0.3, 3.0))
            kind, role, _ = random_.choices(known, [weight for *_, weight in known])[0]
            duration = random_.uniform(1, 4 if role == "redis" else 6)
            began = time.monotonic()
            name = f"{kind} {role}"
            if role == "redis":
                await self._redis(kind, duration)
            else:
                await self._member(random_.choice(self.fleet.of_role(role)), kind, duration)
            over = time.monotonic()
            last = await asyncio.to_thread(self._until_ready)
            self.dealt[name] += 1
            self.spans.append((name, began, time.monotonic()))
            self.recoveries.append((name, time.monotonic() - over, last))

    async def _redis(self, kind: str, duration: float) -> None:
        match kind:
            case "flush":
                await asyncio.to_thread(self.fleet.flush_redis)
            case "stop":
                self.fleet.signal_redis(signal.SIGSTOP)
                await asyncio.sleep(duration)
                self.fleet.signal_redis(signal.SIGCONT)
            case _:
                await asyncio.to_thread(self.fleet.kill_redis)
                await asyncio.sleep(duration)
                self.fleet.start_redis()

    async def _member(self, member: Member, kind: str, duration: float) -> None:
        match kind:
            case "kill":
                self.fleet.end(member, signal.SIGKILL)
                await asyncio.sleep(duration / 2)
            case "terminate":
                self.fleet.end(member, signal.SIGTERM)
                assert member.process is not None
                await asyncio.to_thread(member.process.join, _DRAIN_S)
                if member.alive:
                    self.unexpected.append(f"{member.name} did not leave within {_DRAIN_S:g} s of SIGTERM")
                    self.fleet.end(member, signal.SIGKILL)
                elif member.process.exitcode != 0:
                    self.unexpected.append(f"{member.name} left with status {member.process.exitcode} after SIGTERM")
            case "stop":
                os.kill(member.pid, signal.SIGSTOP)
                await asyncio.sleep(duration)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGCONT)
            case _:
                await asyncio.to_thread(network.cut, member.index)
                await asyncio.sleep(duration)
                if member.alive:
                    await asyncio.to_thread(network.heal, member.index)

    def _until_ready(self) -> str:
        """Start whoever has ended, wait until all serve, and return who was the last. Raises TimeoutError."""
        deadline, last = time.monotonic() + READY_TIMEOUT_S, ""
        while True:
            for member in self.fleet.members.values():
                if not member.alive:
                    assert member.process is not None
                    member.process.join()
                    if member.process.exitcode not in (0, -signal.SIGKILL):
                        self.unexpected.append(f"{member.name} ended with status {member.process.exitcode}")
                    member.ends.append(time.monotonic())
                    self.fleet.start(member)
            late = [member.name for member in self.fleet.members.values() if not self.fleet.is_ready(member)]
            if not late:
                return last
            last = ", ".join(late)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{last} do not serve {READY_TIMEOUT_S:g} s after the last fault")
            time.sleep(0.1)
