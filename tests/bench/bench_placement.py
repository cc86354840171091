"""How evenly chains lie on store nodes, and what that is worth, as a table.

    python -m tests.bench.bench_placement --trace mooncake_conversation.jsonl [--num-nodes 4] [--capacity 2500]

Every prompt of the trace is offered as one chain of 32-token blocks, to the node of its first block and to the one that
`chain_placement` gives. Nodes evict as store nodes do. Sizes are in the trace's own blocks, of 16 of ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from kvstore.block import BlockHash
from loadtest.plan import BLOCK_TOKENS, read_mooncake
from services.worker.store.chain_book import ChainOffer
from services.worker.store.chain_placement import node_of_chain
from tests.bench.conversations import make_conversations
from tests.tiers.blocks import Cache

_TIMES = BLOCK_TOKENS // 32

Place = Callable[[Sequence[BlockHash], Sequence[str]], str]


def by_first_block(prompt: Sequence[BlockHash], node_ids: Sequence[str]) -> str:
    return node_of_chain(ChainOffer(None, (prompt[0],)), node_ids)


def as_workers_do(prompt: Sequence[BlockHash], node_ids: Sequence[str]) -> str:
    return node_of_chain(ChainOffer(None, tuple(each for each in prompt for _ in range(_TIMES))), node_ids)


class Node:
    """A store node's book-keeping: which blocks it has, of those that were offered."""

    def __init__(self, capacity: int) -> None:
        self._cache = Cache(capacity)
        self.num_taken = 0

    def prefix_length(self, prompt: Sequence[BlockHash]) -> int:
        return self._cache.peek_prefix(prompt)

    def use(self, prompt: Sequence[BlockHash]) -> None:
        self._cache.touch(prompt)

    def take(self, prompt: Sequence[BlockHash]) -> None:
        for block_hash, parent in zip(prompt, [None, *prompt[:-1]], strict=True):
            if not self._cache.contains(block_hash):
                self._cache.insert(block_hash, parent, keep=parent)
                self.num_taken += 1


def replay(prompts: Sequence[Sequence[BlockHash]], num_nodes: int, capacity: int, place: Place) -> tuple[float, float]:
    """Share of the prompts' blocks that one node had, and share of the blocks taken that the busiest node took."""
    nodes = {f"store-{i}": Node(capacity) for i in range(num_nodes)}
    num_hits = 0
    for prompt in prompts:
        best = max(nodes.values(), key=lambda node: node.prefix_length(prompt))
        num_found = best.prefix_length(prompt)
        best.use(prompt[:num_found])
        num_hits += num_found
        nodes[place(prompt, list(nodes))].take(prompt)
    taken = [node.num_taken for node in nodes.values()]
    return num_hits / sum(map(len, prompts)), max(taken) / sum(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a Mooncake JSONL file; without one a trace is made up")
    parser.add_argument("--num-requests", type=int, default=6000)
    parser.add_argument("--num-nodes", type=int, default=4)
    parser.add_argument("--capacity", type=int, nargs="+", default=[2500, 10_000], help="of a node, in trace blocks")
    options = parser.parse_args()
    requests = read_mooncake(options.trace, options.num_requests) if options.trace else None
    requests = requests or make_conversations(options.num_requests, seed=0)
    prompts = [[BlockHash(each.to_bytes(16, "big")) for each in request.block_ids] for request in requests]
    print("| a node's capacity | placed by | hit rate | the busiest node takes |\n|---|---|---|---|")
    for capacity in options.capacity:
        for name, place in (("first block", by_first_block), ("chain_placement", as_workers_do)):
            hit_rate, share = replay(prompts, options.num_nodes, capacity, place)
            print(f"| {capacity:,} | {name} | {hit_rate:.3f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
