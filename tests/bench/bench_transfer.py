"""How fast blocks move between two worker processes on this machine, by transport, through the whole block protocol.

    python -m tests.bench.bench_transfer [--blocks 128] [--block-kib 192] [--rounds 20] [--transports ucxx,nixl]
        [--pieces 1:1,24:24,24:1]

An owner in a process of its own lends blocks, this process fetches them: lease, reads, digests, confirmation. Times are
from the announcement of the last block, as in a handoff, to the point named by the column. `--pieces` says in how many
pieces a block lies at the owner and at the reader; engines that keep each layer by itself have as many as layers. On a
machine that others use the processor's time tells more than the clock: it has the protocol, reads, and digests.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO

import numpy as np

from kvstore.block import BlockLayout, HostMemory, PieceMemory
from kvstore.exchange import BlockExchange, PeerIdentity
from kvstore.protocol import AnnouncedBlock, Reservation
from kvstore.transport import make_transports
from tests.peers import PROOFS
from tests.pieces import host_memory
from tests.proofs import KEY, prove_handoff

_POOL_FACTOR = 4  # pools hold so many transfers, so that blocks are scattered and caches cold


def make_exchange(
    name: str, transport: str, num_blocks: int, block_kib: int, num_pieces: int
) -> tuple[BlockExchange, HostMemory | PieceMemory]:
    """Build one worker's exchange over a pool of `num_blocks * _POOL_FACTOR` blocks."""
    layout = BlockLayout(1, 1, 32, block_kib * 4, "float32", "be0c")
    memory = host_memory(num_pieces, num_blocks * _POOL_FACTOR, layout.block_bytes)
    identity = PeerIdentity(name, name, f"{name}-{os.getpid()}", layout)
    return BlockExchange(
        identity, memory, make_transports(transport, memory, name, "127.0.0.1"), proof_key=KEY, keys=PROOFS.blocks
    ), memory


async def own(arguments: argparse.Namespace) -> None:
    """The child: announces all blocks of a transfer at once, whenever the parent writes a line."""
    num_pieces = int(arguments.pieces.partition(":")[0])
    exchange, memory = make_exchange("owner", arguments.transports, arguments.blocks, arguments.block_kib, num_pieces)
    memory.array[:] = np.random.default_rng(1).integers(0, 256, memory.array.shape, np.uint8)
    await exchange.start("127.0.0.1", 0)
    print("address", exchange.address, flush=True)
    ids = list(range(memory.num_blocks))
    rng = random.Random(1)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        block_ids = ids[: arguments.blocks] if line.startswith(b"neighbours") else rng.sample(ids, arguments.blocks)
        transfer_id = bytes.fromhex(line.split()[1].decode())
        lease = exchange.open_lease(transfer_id, "reader", arguments.blocks)
        await asyncio.sleep(0.02)  # the reader reserves meanwhile, as it would behind the prompt's computation
        proofs = prove_handoff(memory, block_ids, transfer_id)
        announced = [AnnouncedBlock(*block) for block in zip(block_ids, [None] * len(block_ids), proofs, strict=True)]
        cpu_s = time.process_time()
        print("announced", time.monotonic(), flush=True)
        lease.announce(0, announced, last=True)
        await lease.closed
        print("cpu", time.process_time() - cpu_s, flush=True)
    await exchange.close()


def answer(lines: IO[str], word: str) -> str:
    """Return what the child says after `word`; UCX writes to the same stream."""
    return next(line.split()[1] for line in lines if line.startswith(word + " "))


def spawn_owner(arguments: argparse.Namespace, transport: str) -> subprocess.Popen[str]:
    """Start the child; its orders and answers are lines."""
    command = [sys.executable, "-m", "tests.bench.bench_transfer", "--own", "--transports", transport]
    command += ["--blocks", str(arguments.blocks), "--block-kib", str(arguments.block_kib)]
    command += ["--pieces", arguments.pieces]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def measure(arguments: argparse.Namespace, transport: str, child: subprocess.Popen[str]) -> None:
    """Fetch over one transport and print its rows."""
    assert child.stdin is not None
    assert child.stdout is not None
    num_pieces = int(arguments.pieces.partition(":")[2])
    exchange, memory = make_exchange("reader", transport, arguments.blocks, arguments.block_kib, num_pieces)
    await exchange.start("127.0.0.1", 0)
    rng, lane = random.Random(2), "?"
    try:
        address = answer(child.stdout, "address")
        started = time.monotonic()
        await exchange.connect(address)
        connect_ms = (time.monotonic() - started) * 1e3
        for kind in ("scattered", "neighbours"):
            rows = []
            for _ in range(arguments.rounds):
                target = list(range(arguments.blocks))
                if kind == "scattered":
                    target = rng.sample(range(memory.num_blocks), arguments.blocks)

                async def reserve(num_blocks: int, block_ids: list[int] = target) -> Reservation:
                    return Reservation(block_ids)

                transfer_id = os.urandom(16)
                fetch = exchange.fetch(transfer_id, "owner", [None] * arguments.blocks, reserve)
                child.stdin.write(f"{kind} {transfer_id.hex()}\n")
                child.stdin.flush()
                cpu_s = time.process_time()
                result = await fetch.result
                cpu_s = time.process_time() - cpu_s
                if not result.ok:
                    raise SystemExit(f"{transport}: {result.failure}")
                announced_at = float(answer(child.stdout, "announced"))
                stamps = result.stamps
                assert stamps.last_read is not None
                assert stamps.verified is not None
                assert stamps.confirmed is not None
                rows.append(
                    [
                        (stamps.last_read - announced_at) * 1e3,
                        (stamps.verified - announced_at) * 1e3,
                        (stamps.confirmed - stamps.verified) * 1e3,
                        (stamps.confirmed - announced_at) * 1e3,
                        cpu_s * 1e3,
                        float(answer(child.stdout, "cpu")) * 1e3,
                    ]
                )
            owners = exchange.state()["owners"]
            lane = str(owners[0]["lane"]) if isinstance(owners, list) else lane
            print_row(transport, lane, kind, rows[1:], arguments, connect_ms)
    finally:
        await exchange.close()


def print_row(
    transport: str,
    lane: str,
    kind: str,
    rows: Sequence[Sequence[float]],
    arguments: argparse.Namespace,
    connect_ms: float,
) -> None:
    """Print medians and the best whole."""
    read, verified, confirm, whole, cpu_reader, cpu_owner = (
        statistics.median(column) for column in zip(*rows, strict=True)
    )
    gb = arguments.blocks * arguments.block_kib * 1024 / 1e9
    best = min(row[3] for row in rows)
    print(
        f"{transport:<6}{lane:<9}{arguments.pieces:<9}{kind:<12}{read:>9.2f}{verified:>10.2f}{confirm:>10.2f}{whole:>9.2f}{best:>9.2f}"
        f"{gb / read * 1e3:>8.2f}{cpu_reader:>9.2f}{cpu_owner:>9.2f}{connect_ms:>11.1f}",
        flush=True,
    )


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transports", default="ucxx,nixl")
    parser.add_argument("--blocks", type=int, default=128)
    parser.add_argument("--block-kib", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--pieces", default="1:1", help="OWNER:READER, several with commas")
    parser.add_argument("--own", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.own:
        asyncio.run(own(arguments))
        return
    names, all_pieces = arguments.transports.split(","), arguments.pieces.split(",")
    if len(names) * len(all_pieces) > 1:  # a process each: what one leaves behind there is not the other's to pay
        print(f"{arguments.blocks} blocks of {arguments.block_kib} KiB, medians in ms from the last announcement:")
        print(
            "name  lane     pieces   blocks           read  verified   confirm    whole     best    GB/s"
            "  cpu reader, owner  connect ms"
        )
        for name, pieces in itertools.product(names, all_pieces):
            chosen = ["--transports", name, "--pieces", pieces]
            subprocess.run([sys.executable, "-m", "tests.bench.bench_transfer", *sys.argv[1:], *chosen])
        return
    with spawn_owner(arguments, names[0]) as child:
        asyncio.run(measure(arguments, names[0], child))


if __name__ == "__main__":
    main()
