"""How long a client hears nothing when something fails, with another worker at hand.

    make bench BENCHES=tests/bench/bench_silence.py
    make bench BENCHES=tests/bench/bench_silence.py BENCH_ARGS='--runs 3 --faults "decode stopped" "redis stopped"'

Starts two prefill and two decode workers, a store node, a router and Redis, all with default deadlines, and for each
fault asks for one long greedy stream. The fault comes in mid-stream, or right before the request where that says so.
The silence is the longest time without news between the request, or the fault, and the end; of requests whose first
token is waited for, what an undisturbed one takes is in the table, too. Between the processes lie relays, which can
hold everything back (a partition) or lose one end (a half-open connection). What hangs is a single thread, held by the
kernel, of a process that goes on otherwise: its engine's, its event loop's, its NIXL agent's, its disk's.

For the rows "of a prefix on disk" the same fleet is started anew, with a small store and small caches, and workers that
fetch whatever they find; fillers push the prompts out of all but the store's files.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.completions import Client
from tests.held_threads import held, named
from tests.hf_models import random_prompts, write_model
from tests.ports import free_port
from tests.relay import FAR_HOST, Relays
from tests.stack import Stack

NUM_TOKENS = 1500
FAULT_AT = 100
PROMPT_TOKENS = 1800
NUM_FILLERS = 12
SMALL_WORKER = "--num-gpu-blocks-override 160 --prefix-fetch always"
SMALL_STORE = "--store-dram-bytes 2MiB --store-disk-dir {disk} --store-disk-bytes 1GiB"
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
STOPPABLE = (*WORKERS, "store-0")


class Fleet:
    """The processes, and what can be done to them."""

    def __init__(self, stack: Stack, relays: Relays, ports: dict[str, tuple[int, int]]) -> None:
        self.stack = stack
        self._relays = relays
        self._ports = ports
        self._hanging: dict[str, contextlib.ExitStack] = {}  # by process

    def stop(self, name: str) -> None:
        os.kill(self._pid(name), signal.SIGSTOP)

    def part(self, name: str) -> None:
        self._relays.stall(*self._ports[name])

    def lose(self, name: str) -> None:
        self._relays.half_open(*self._ports[name])

    def forget_orders(self) -> None:
        """Connections for orders to prefill workers lead nowhere any more; those for blocks, and new ones, do not."""
        self._relays.forget(*(self._ports[name][0] for name in WORKERS if name.startswith("prefill")))

    def hang(self, name: str, thread: str = "") -> None:
        """Hold threads of that name, or else the event loop."""
        pid = self._pid(name)
        threads = named(pid, thread) if thread else [pid]
        assert threads, f"{name} has no thread {thread}"
        for each in threads:
            self._hanging.setdefault(name, contextlib.ExitStack()).enter_context(held(each))

    def go_on(self, name: str) -> None:
        """Let go what hangs of a process."""
        self._hanging.pop(name, contextlib.ExitStack()).close()

    def heal(self) -> None:
        for name in list(self._hanging):
            self.go_on(name)
        for name in (*STOPPABLE, "redis"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid(name), signal.SIGCONT)
        for ports in self._ports.values():
            self._relays.heal(*ports)
        self.stack.wait_for(self._are_ready, "all workers to serve again")

    def _are_ready(self) -> bool:
        urls = [self.stack.services[name].debug_url for name in STOPPABLE]
        return all(httpx.get(f"{url}/ready", timeout=10).status_code == 200 for url in urls)

    def serving(self, role: str, timeout_s: float = 10.0) -> str:
        """The worker of that role that has something to do now."""
        key = "live" if role == "decode" else "orders"
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            for name in WORKERS:
                if name.startswith(role) and self.stack.debug_state(name)[key]:
                    return name
        raise TimeoutError(f"no {role} worker has anything to do")

    def _pid(self, name: str) -> int:
        pid = self.stack.redis.pid if name == "redis" else self.stack.services[name].process.pid
        assert pid is not None
        return pid


@dataclass(frozen=True)
class Fault:
    """`cause` is called in mid-stream, or, where it is `early`, before the request.

    `on_disk`: the prompt's blocks are in the store's files, and nowhere else.
    """

    name: str
    cause: Callable[[Fleet], None]
    early: bool = False
    on_disk: bool = False
    then: Callable[[Fleet], None] = lambda fleet: None
    """What is done once the request is on its way."""


def only_serving_prefill_hangs(fleet: Fleet) -> None:
    """Both step loops hang, so that whoever gets the order hangs: the other one goes on as soon as that is known."""
    serving = fleet.serving("prefill")
    fleet.go_on("prefill-1" if serving == "prefill-0" else "prefill-0")


def hang_engines(fleet: Fleet) -> None:
    for name in ("prefill-0", "prefill-1"):
        fleet.hang(name, "engine")


def hang_agents(fleet: Fleet, role: str) -> None:
    for name in WORKERS:
        if name.startswith(role):
            fleet.hang(name, "kv-nixl")


FAULTS = (
    Fault("none", lambda fleet: None),
    Fault("decode stopped", lambda fleet: fleet.stop(fleet.serving("decode"))),
    Fault("decode cut off", lambda fleet: fleet.part(fleet.serving("decode"))),
    Fault("decode half open", lambda fleet: fleet.lose(fleet.serving("decode"))),
    Fault("decode stopped before the request", lambda fleet: fleet.stop("decode-0"), early=True),
    Fault("prefill stopped before the request", lambda fleet: fleet.stop("prefill-0"), early=True),
    Fault("prefill cut off before the request", lambda fleet: fleet.part("prefill-0"), early=True),
    Fault("orders forgotten before the request", Fleet.forget_orders, early=True),
    Fault("store stopped before the request", lambda fleet: fleet.stop("store-0"), early=True),
    Fault("decode step loop hangs", lambda fleet: fleet.hang(fleet.serving("decode"), "engine")),
    Fault("decode event loop hangs", lambda fleet: fleet.hang(fleet.serving("decode"))),
    Fault("prefill step loop hangs before the request", hang_engines, early=True, then=only_serving_prefill_hangs),
    Fault("prefill event loop hangs before the request", lambda fleet: fleet.hang("prefill-0"), early=True),
    Fault("decode NIXL agents hang before the request", lambda fleet: hang_agents(fleet, "decode"), early=True),
    Fault("prefill NIXL agents hang before the request", lambda fleet: hang_agents(fleet, "prefill"), early=True),
    Fault("redis stopped", lambda fleet: fleet.stop("redis")),
    Fault("redis stopped before the request", lambda fleet: fleet.stop("redis"), early=True),
    Fault("none, of a prefix on disk", lambda fleet: None, on_disk=True),
    Fault("store disk hangs, of a prefix on it", lambda fleet: fleet.hang("store-0", "disk-tier"), True, True),
)


@dataclass
class Heard:
    """What a client heard of one stream."""

    first_token_s: float = 0.0
    silence_s: float = 0.0
    num_tokens: int = 0
    error: str = ""
    fetched: set[str] = field(default_factory=set)
    """The tiers that its prefix came from."""


async def listen(client: Client, prompt: list[int], in_midst: Callable[[], None]) -> Heard:
    heard, begun_s = Heard(), time.monotonic()
    last_s, is_caused = begun_s, False
    try:
        async with client.stream(prompt, max_tokens=NUM_TOKENS) as events:
            async for event in events:
                now_s = time.monotonic()
                heard.silence_s, last_s = max(heard.silence_s, now_s - last_s), now_s
                if "error" in event:
                    heard.error = event["error"]["message"]
                    break
                heard.first_token_s = heard.first_token_s or now_s - begun_s
                for sequence in event.get("receipt", {}).get("sequences", ()):
                    heard.fetched |= {part["tier"] for part in sequence["fetched"]}
                heard.num_tokens += sum(len(choice["token_ids"]) for choice in event["choices"])
                if heard.num_tokens > FAULT_AT and not is_caused:
                    is_caused = True
                    await asyncio.to_thread(in_midst)
    except (httpx.HTTPError, AssertionError) as error:
        heard.silence_s = max(heard.silence_s, time.monotonic() - last_s)
        heard.error = repr(error)[:100]
    return heard


async def run(fleet: Fleet, fault: Fault, prompt: list[int]) -> Heard:
    async with Client(fleet.stack, NUM_TOKENS) as client:
        try:
            if fault.early:
                fault.cause(fleet)
            then = asyncio.create_task(asyncio.to_thread(fault.then, fleet))
            heard = await listen(client, prompt, lambda: None if fault.early else fault.cause(fleet))
            await then
            return heard
        finally:
            fleet.heal()
            await asyncio.sleep(6)  # leases run out, what was shunned is so no more, sessions are back


@contextmanager
def fleet_of(directory: Path, model: Path, router: str, worker: str, store: str) -> Iterator[Fleet]:
    ports = {name: (free_port(), free_port()) for name in WORKERS}
    far = {name: f"--advertise-host {FAR_HOST} --port {grpc} --kv-port {kv}" for name, (grpc, kv) in ports.items()}
    stack = Stack(
        directory,
        prefill=[far["prefill-0"], far["prefill-1"]],
        decode=[far["decode-0"], far["decode-1"]],
        store=[f"{store} --kv-transport nixl"],
        worker=f"--kv-transport nixl {worker}",
        router=router,
        model=model,
    )
    with Relays([port for pair in ports.values() for port in pair]) as relays, stack:
        for service in stack.services.values():
            service.debug_url = service.debug_url.replace(FAR_HOST, "127.0.0.1")
        yield Fleet(stack, relays, ports)


async def keep_on_disk(fleet: Fleet, prompts: list[list[int]]) -> None:
    """Have these in the store's files, and push them out of all caches, and of the store's memory."""
    async with Client(fleet.stack, 1) as client:
        for prompt in [*prompts, *random_prompts([PROMPT_TOKENS] * NUM_FILLERS, seed=1000)]:
            await client.complete(prompt)
            await asyncio.sleep(0.5)  # the store fetches what workers offer it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--faults", nargs="*", default=[fault.name for fault in FAULTS])
    parser.add_argument("--router", default="", help="further flags of the router")
    options = parser.parse_args()
    print(f"{'fault':44} {'first token':>12} {'silence':>9} {'tokens':>7}  end", flush=True)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        model = write_model(directory / "model", "qwen3", max_position_embeddings=4096)
        for on_disk, worker, store in (
            (False, "--num-gpu-blocks-override 512", "--store-dram-bytes 64MiB"),
            (True, SMALL_WORKER, SMALL_STORE),
        ):
            faults = [fault for fault in FAULTS if fault.name in options.faults and fault.on_disk == on_disk]
            if not faults:
                continue
            with fleet_of(directory / f"logs-{on_disk}", model, options.router, worker, store) as fleet:
                for number in range(options.runs):
                    prompts = random_prompts([PROMPT_TOKENS] * len(faults), seed=number)
                    if on_disk:
                        asyncio.run(keep_on_disk(fleet, prompts))
                    for fault, prompt in zip(faults, prompts, strict=True):
                        heard = asyncio.run(run(fleet, fault, prompt))
                        times = f"{heard.first_token_s:10.2f} s {heard.silence_s:7.2f} s"
                        end = ", ".join([heard.error or "whole", *sorted(heard.fetched)])
                        print(f"{fault.name:44} {times} {heard.num_tokens:7}  {end}", flush=True)


if __name__ == "__main__":
    main()
