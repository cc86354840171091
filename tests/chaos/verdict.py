"""What a run of chaos comes to: answers, gauges, memory and descriptors; and the tables that it prints."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Final

import httpx

from tests.chaos.faults import Nemesis
from tests.chaos.fleet import Fleet, Member
from tests.chaos.load import ALLOWED, Load, Outcome
from tests.peers import AUTHORIZATION
from tests.soak import Track

_REST_S: Final = 60.0
LOOK_S: Final = 2.0
_JUDGED_MIN: Final = 5.0
"""Who has lived for so long has had its first touches of everything behind it in the second half."""
_MAX_MB_PER_MIN: Final = 3.0
_MAX_MORE_FILES: Final = 16
"""Connections to peers of before, which end by their time-outs."""


def failures(load: Load) -> list[str]:
    """The answers that should not have been."""
    failed = [result for result in load.results if result.outcome not in ALLOWED]
    problems = [f"{result.case.name}: {result.outcome}: {result.detail[:600]}" for result in failed]
    if load.counts[Outcome.RIGHT] == 0:
        problems.append("no request was answered: nothing was tested")
    return problems


def unrest(fleet: Fleet) -> list[str]:
    """Which gauges do not come back to zero, and whose books are wrong."""
    deadline = time.monotonic() + _REST_S * fleet.patience
    while True:
        problems = []
        for member in fleet.members.values():
            if member.role == "redis":
                continue
            try:
                problems += _held(fleet, member)
            except httpx.HTTPError as error:
                problems.append(f"{member.name} does not answer: {error}")
        if not problems or time.monotonic() > deadline:
            return problems
        time.sleep(0.2)


def _held(fleet: Fleet, member: Member) -> list[str]:
    if member.role == "router":
        running = sum(fleet.metric(member, f"vllm:num_requests_{state}") for state in ("running", "waiting"))
        return [f"{member.name} has {running:g} requests under way"] if running else []
    if member.role == "store":
        return []
    held = fleet.metric(member, "tandem:kv_blocks") - fleet.metric(member, "tandem:kv_blocks_free")
    response = fleet.http.get(f"{member.http_url}/debug/integrity", headers=AUTHORIZATION)
    problems = [f"{member.name} holds {held:g} blocks"] if held else []
    return problems + ([f"{member.name}: {response.text}"] if response.status_code != 200 else [])


@dataclass
class Footprints:
    """Memory and descriptors of each start of each process over time, `run` until it is cancelled."""

    fleet: Fleet
    tracks: dict[str, list[Track]] = field(default_factory=dict)

    async def run(self) -> None:
        began = time.monotonic()
        while True:
            for member in self.fleet.members.values():
                if member.alive:
                    with contextlib.suppress(OSError):  # it has just ended
                        self._of(member).look((time.monotonic() - began) / 60)
            await asyncio.sleep(LOOK_S)

    def _of(self, member: Member) -> Track:
        """The track of this start."""
        tracks = self.tracks.setdefault(member.name, [])
        if not tracks or tracks[-1].pid != member.pid:
            tracks.append(Track(member.name, member.pid))
        return tracks[-1]

    def growth(self) -> list[str]:
        """Who has grown. A start that lived for less than five minutes is not judged."""
        problems = []
        for track in (track for tracks in self.tracks.values() for track in tracks if is_judged(track)):
            if (slope := track.slope_mb_per_min) > _MAX_MB_PER_MIN:
                problems.append(f"{track.name} grew by {slope:.1f} MB a minute, to {track.memory_mb[-1]:.0f} MB")
            middle = track.num_files[len(track.num_files) // 2]
            if track.num_files[-1] > middle + _MAX_MORE_FILES:
                problems.append(f"{track.name} had {middle} descriptors, and {track.num_files[-1]} in the end")
        return problems


def is_judged(track: Track) -> bool:
    """Whether it lived for long enough to say that it is flat."""
    return bool(track.minutes) and track.minutes[-1] - track.minutes[0] >= _JUDGED_MIN


def table(load: Load, nemesis: Nemesis, footprints: Footprints) -> str:
    """Markdown: requests, faults, processes."""
    lines = ["", "| requests | |", "|---|---|"]
    lines += [f"| {outcome} | {count} |" for outcome, count in sorted(load.counts.items())]
    lines += [f"| resumed or moved | {sum(result.num_resumes > 0 for result in load.results)} |"]
    waits = [result.waited_s for result in load.results if result.waited_s]
    lines += [f"| taken at the second or a later try, within {max(waits, default=0):.1f} s | {len(waits)} |", ""]
    lines += ["| fault | dealt | a stream's longest silence, s | all serve again after, s |", "|---|---|---|---|"]
    for name, count in sorted(nemesis.dealt.items()):
        spans = [(begin, end) for each, begin, end in nemesis.spans if each == name]
        silences = [
            result.silence_s
            for result in load.results
            for begin, end in spans
            if result.heard_at > begin and result.heard_at - result.silence_s < end
        ]
        recovery, last = max((seconds, last) for each, seconds, last in nemesis.recoveries if each == name)
        lines.append(f"| {name} | {count} | {max(silences, default=0):.1f} | {recovery:.1f} ({last}) |")
    minutes = (nemesis.spans[-1][2] - nemesis.spans[0][1]) / 60 if nemesis.spans else 0
    lines += ["", f"{len(nemesis.spans)} faults in {minutes:.1f} minutes"]
    lines += ["", "| process | starts | MB, descriptors at first | in the end | MB a minute |", "|---|---|---|---|---|"]
    for name, tracks in footprints.tracks.items():
        first, last_ = tracks[0], tracks[-1]
        cells = [f"{track.memory_mb[at]:.0f}, {track.num_files[at]}" for track, at in ((first, 0), (last_, -1))]
        slope = f"{last_.slope_mb_per_min:+.2f}" if is_judged(last_) else "too young"
        lines.append(f"| {name} | {len(tracks)} | {cells[0]} | {cells[1]} | {slope} |")
    return "\n".join(lines)
