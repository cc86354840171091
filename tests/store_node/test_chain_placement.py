"""Where chains go among store nodes: spread, also where they begin alike, and steady."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvstore.block import BlockHash
from services.worker.store.chain_book import ChainOffer
from services.worker.store.chain_placement import node_of_chain
from tests.store_node.store_world import chain

NODES = ["store-0", "store-1", "store-2"]


def node_of(hashes: list[BlockHash], nodes: list[str] = NODES, parent: BlockHash | None = None) -> str:
    return node_of_chain(ChainOffer(parent, tuple(hashes)), nodes)


def assert_shared_out(nodes: Iterable[str]) -> None:
    counts = Counter(nodes)
    assert min(counts[node] for node in NODES) > 60, counts


def test_a_chain_stays_with_its_node_when_others_come_and_moves_only_when_it_goes() -> None:
    chains = {i: chain(f"chain{i}", 1 + i % 80) for i in range(300)}
    before = {i: node_of(hashes) for i, hashes in chains.items()}
    assert_shared_out(before.values())
    after = {i: node_of(hashes, [*NODES, "store-3"]) for i, hashes in chains.items()}
    assert all(after[i] in (before[i], "store-3") for i in chains)
    without = {i: node_of(hashes, NODES[:2]) for i, hashes in chains.items()}
    assert all(without[i] == before[i] for i in chains if before[i] != "store-2")


def test_conversations_after_one_system_prompt_are_spread() -> None:
    system = chain("system", 30)
    conversations = [system + chain(f"conversation{i}", 40) for i in range(300)]
    assert_shared_out(map(node_of, conversations))
    # Those that share even the block that decides are together.
    long_system = chain("long system", 200)
    assert len({node_of(long_system + chain(f"conversation{i}", 20)) for i in range(50)}) == 1
    assert len({node_of(long_system + chain(f"conversation{i}", 60)) for i in range(50)}) == len(NODES)


def test_a_growing_chain_moves_at_few_lengths() -> None:
    for i in range(20):
        hashes = chain(f"chain{i}", 3000)
        nodes = [node_of(hashes[:length]) for length in range(1, len(hashes) + 1)]
        moves = [length for length in range(1, len(nodes)) if nodes[length] != nodes[length - 1]]
        assert set(moves) <= {32, 256, 2048}


def test_of_a_chain_without_its_head_the_parent_decides() -> None:
    hashes, parent = chain("middle", 100), chain("parent", 1)[0]
    assert {node_of(hashes[:length], parent=parent) for length in (1, 40, 100)} == {node_of([parent])}
