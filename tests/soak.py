"""Does a fleet that serves for an hour keep its size? Mixed load, and what each process holds over time.

    make soak MINUTES=60
    python -m tests.soak --minutes 10 --clients 8

Streams of all lengths, greedy and sampled, with prompts that share prefixes and some that do not; four in ten are cut
by the client. Every minute or so a row: resident memory and open files of each process. A process is flat where its
memory grows by less than 0.3 MB a minute, and its open files by less than one in two minutes, over the second half, by
least squares. In the end no worker holds a block.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.completions import Client
from tests.hf_models import SPECIAL_TOKENS, VOCAB_SIZE, random_prompts, write_model
from tests.stack import Stack

MAX_SLOPE_MB_PER_MIN = 0.3
MAX_SLOPE_FILES_PER_MIN = 0.5
CUT_SHARE = 0.4
_NUM_ROWS = 30
_FIRST_TOKEN = len(SPECIAL_TOKENS)
_MB = 1 << 20


@dataclass
class Track:
    """What one process held, over time."""

    name: str
    pid: int
    minutes: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    num_files: list[int] = field(default_factory=list)

    def look(self, minute: float) -> None:
        self.minutes.append(minute)
        self.memory_mb.append(_resident_bytes(self.pid) / _MB)
        self.num_files.append(sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir()))

    @property
    def slope_mb_per_min(self) -> float:
        """Over the second half."""
        half = len(self.minutes) // 2
        return slope(self.minutes[half:], self.memory_mb[half:])

    @property
    def slope_files_per_min(self) -> float:
        """Over the second half."""
        half = len(self.minutes) // 2
        return slope(self.minutes[half:], self.num_files[half:])

    @property
    def is_flat(self) -> bool:
        return self.slope_mb_per_min < MAX_SLOPE_MB_PER_MIN and self.slope_files_per_min < MAX_SLOPE_FILES_PER_MIN


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line with the least squares; 0 where there is none."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((each - mean_x) ** 2 for each in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0


@dataclass
class Load:
    """What the clients have seen."""

    num_whole: int = 0
    num_cut: int = 0
    errors: list[str] = field(default_factory=list)


async def one_client(client: Client, rng: random.Random, shared: list[list[int]], load: Load) -> None:
    """Ask for streams, one after the other, for ever."""
    while True:
        tail = rng.choices(range(_FIRST_TOKEN, VOCAB_SIZE), k=rng.randint(10, 400))
        prompt = (rng.choice(shared) if rng.random() < 0.6 else []) + tail
        num_tokens = rng.choice((1, 8, 40, 150))
        cut_after = rng.randint(1, num_tokens) if rng.random() < CUT_SHARE else None
        num_seen = 0
        try:
            async with client.stream(prompt, max_tokens=num_tokens, temperature=rng.choice((0, 0.8))) as events:
                async for event in events:
                    if "error" in event:
                        load.errors.append(str(event["error"]))
                        break
                    num_seen += sum(len(choice["token_ids"]) for choice in event["choices"])
                    if cut_after is not None and num_seen >= cut_after:
                        load.num_cut += 1
                        break
                else:
                    load.num_whole += 1
        except AssertionError as error:  # refused
            load.errors.append(str(error)[:200])


async def soak(stack: Stack, minutes: float, num_clients: int, tracks: Sequence[Track]) -> Load:
    load, rng = Load(), random.Random(1)
    shared = random_prompts([700] * 20, seed=2)
    begun_s = time.monotonic()
    print("minute  " + "  ".join(f"{track.name:>14}" for track in tracks) + "   MB, files", flush=True)
    async with Client(stack, 1) as client:
        tasks = [
            asyncio.create_task(one_client(client, random.Random(rng.random()), shared, load))
            for _ in range(num_clients)
        ]
        while (minute := (time.monotonic() - begun_s) / 60) < minutes:
            for track in tracks:
                track.look(minute)
            row = "  ".join(f"{track.memory_mb[-1]:9.1f} {track.num_files[-1]:4}" for track in tracks)
            print(f"{minute:6.1f}  {row}", flush=True)
            done, _ = await asyncio.wait(tasks, timeout=60 * minutes / _NUM_ROWS)
            for task in done:
                task.result()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return load


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        stack = Stack(
            Path(place) / "stack",
            prefill=["", ""],
            decode=["", ""],
            store=["--store-dram-bytes 32MiB --store-disk-dir {disk} --store-disk-bytes 128MiB"],
            worker="--num-gpu-blocks-override 1024",
            model=write_model(Path(place) / "model", "qwen3"),
        )
        with stack:
            tracks = [Track(name, service.process.pid or 0) for name, service in stack.services.items()]
            load = asyncio.run(soak(stack, options.minutes, options.clients, tracks))
            stack.check_clean()
    print(f"{load.num_whole} streams whole, {load.num_cut} cut by clients, {len(load.errors)} errors {load.errors[:3]}")
    for track in tracks:
        verdict = "flat" if track.is_flat else "grows"
        slopes = f"{track.slope_mb_per_min:+7.2f} MB, {track.slope_files_per_min:+5.2f} files"
        print(f"{track.name:12} {slopes} a minute in the second half: {verdict}")
    return 0 if all(track.is_flat for track in tracks) and not load.errors else 1


if __name__ == "__main__":
    sys.exit(main())
