"""A process with both transports, as a worker with that `--host` has them: `python -m … HOST`.

It prints where its pool is, and for each line that it reads the first bytes of its blocks, and how
often each transport's thread has come round.
"""

import asyncio
import json
import sys

from kvstore.block import HostMemory
from kvstore.transport import make_transports

NUM_BLOCKS = 8
BLOCK_BYTES = 4096


async def main(host: str) -> None:
    memory = HostMemory.allocate(NUM_BLOCKS, BLOCK_BYTES)
    transports = make_transports("auto", memory, "peer", host)
    for transport in transports:
        await transport.start()
    print(json.dumps({"pool": memory.geometry.regions[0].address}), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        turns = {transport.name: transport.num_turns for transport in transports}
        first_bytes = [bytes(memory.view(block)[:16]).hex() for block in range(NUM_BLOCKS)]
        print(json.dumps({"first_bytes": first_bytes, "turns": turns}), flush=True)
    for transport in transports:
        await transport.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
