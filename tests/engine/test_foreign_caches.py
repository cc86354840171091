"""Another engine's caches as blocks: what is not as we think it is is refused before anything is cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvstore.block import BlockHash
from services.engine.api import EngineError
from services.engine.foreign import (
    Kept,
    PlacedGenerator,
    RankCache,
    byte_view,
    check_books,
    gather_ranks,
    num_holders,
    probe,
    scales_digest,
)
from services.engine.model_config import ModelError, UnsupportedModel

NUM_BLOCKS = 6
KEPT = Kept(
    num_layers=3, num_kv_heads=2, block_size=4, num_vectors=2, head_dim=8, dtype=torch.float32, is_head_major=True
)
Write = Callable[[int, Tensor, Tensor], None]


def cache_of(kept: Kept) -> Tensor:
    """All layers in one allocation: `[layers, blocks, heads, tokens, vectors * numbers]`, tokens before heads if so."""
    inner = (kept.num_kv_heads, kept.block_size) if kept.is_head_major else (kept.block_size, kept.num_kv_heads)
    return torch.zeros(kept.num_layers, NUM_BLOCKS, *inner, kept.num_vectors * kept.head_dim, dtype=kept.dtype)


def view_of(cache: Tensor) -> Tensor:
    return byte_view({f"layer {i}": each for i, each in enumerate(cache)}, NUM_BLOCKS, joins_layers=False)


def writer(cache: Tensor, kept: Kept) -> Write:
    """An engine's own path, as it should be; numbers of one byte are torch's."""

    def write(layer: int, values: Tensor, slots: Tensor) -> None:
        if kept.dtype is torch.uint8:
            values = values.to(torch.float8_e4m3fn).view(torch.uint8)
        for value, slot in zip(values, slots.tolist(), strict=True):
            block, place = divmod(slot, kept.block_size)
            (cache[layer, block, :, place] if kept.is_head_major else cache[layer, block, place])[:] = value

    return write


KINDS = {
    "float32": KEPT,
    "bfloat16": replace(KEPT, dtype=torch.bfloat16),
    "one byte": replace(KEPT, dtype=torch.uint8),
    "tokens before heads": replace(KEPT, is_head_major=False),
    "one vector": replace(KEPT, num_kv_heads=1, num_vectors=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_holds_what_was_written_is_known_by_its_packing_and_left_as_it_was(kind: str) -> None:
    kept = KINDS[kind]
    cache = cache_of(kept)
    cache.view(torch.uint8).copy_(torch.arange(cache.nbytes).reshape(cache.view(torch.uint8).shape) % 251)
    before, packing = cache.clone(), probe(view_of(cache), kept, writer(cache, kept))
    assert torch.equal(cache.view(torch.uint8), before.view(torch.uint8))
    assert len(packing) == 16
    others = [each for name, each in KINDS.items() if name != kind]
    for other in (kept, *others):
        one = cache_of(other)
        assert (probe(view_of(one), other, writer(one, other)) == packing) == (other is kept)


def test_workers_whose_ranks_have_other_numbers_of_heads_share_a_packing() -> None:
    whole, half = cache_of(KEPT), replace(KEPT, num_kv_heads=1)
    part = cache_of(half)
    assert probe(view_of(whole), KEPT, writer(whole, KEPT)) == probe(view_of(part), half, writer(part, half))


def elsewhere(cache: Tensor, kept: Kept, write: Write) -> Write:
    """One block further than it was told."""
    return lambda layer, values, slots: write(layer, values, (slots + kept.block_size) % (NUM_BLOCKS * kept.block_size))


def beside(cache: Tensor, kept: Kept, write: Write) -> Write:
    """Where it was told, and elsewhere."""

    def twice(layer: int, values: Tensor, slots: Tensor) -> None:
        write(layer, values, slots)
        cache[layer, 0].view(torch.uint8).fill_(9)

    return twice


def by_block(cache: Tensor, kept: Kept, write: Write) -> Write:
    """The same numbers in other bytes, by the place that they have in the cache."""

    def turned(layer: int, values: Tensor, slots: Tensor) -> None:
        write(layer, values.roll(int(slots[0]) // kept.block_size, dims=2), slots)

    return turned


def beyond(cache: Tensor, kept: Kept, write: Write) -> Write:
    """One layer to memory that is no block of ours."""
    return lambda layer, values, slots: write(layer, values, slots) if layer != 1 else None


def rounded(cache: Tensor, kept: Kept, write: Write) -> Write:
    """Other numbers."""
    return lambda layer, values, slots: write(layer, values * 1.5, slots)


def heads_crossed(cache: Tensor, kept: Kept, write: Write) -> Write:
    """Each head where the other should be."""
    return lambda layer, values, slots: write(layer, values.flip(1), slots)


WRONG = [
    (elsewhere, "appeared in another of ours"),
    (beside, "appeared in another of ours"),
    (by_block, "have other bytes in another block"),
    (beyond, "did not come into ours"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("wrongly", "said"), WRONG, ids=[each.__name__ for each, _ in WRONG])
def test_what_an_engine_writes_otherwise_than_we_think_is_refused(
    kind: str, wrongly: Callable[[Tensor, Kept, Write], Write], said: str
) -> None:
    kept = KINDS[kind]
    cache = cache_of(kept)
    with pytest.raises(ModelError, match=said):
        probe(view_of(cache), kept, wrongly(cache, kept, writer(cache, kept)))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrongly", [rounded, heads_crossed])
def test_a_block_that_holds_other_values_is_refused(kind: str, wrongly: Callable[[Tensor, Kept, Write], Write]) -> None:
    """Not of one byte: what stands for a number there is the engine's affair, and its scale's."""
    kept = KINDS[kind]
    cache = cache_of(kept)
    with pytest.raises(ModelError, match="does not hold the keys and values"):
        probe(view_of(cache), kept, wrongly(cache, kept, writer(cache, kept)))


# ---- byte_view ----------------------------------------------------------------------------


@pytest.mark.parametrize("joins_layers", [True, False])
def test_a_view_has_a_pool_s_bytes_whichever_way_round_its_axes_are(joins_layers: bool) -> None:
    layers_first = torch.arange(3 * 6 * 8, dtype=torch.int16).reshape(3, 6, 8)
    view = byte_view(named(layers_first), 6, joins_layers=joins_layers)
    assert view.shape == (3, 6, 16)
    assert torch.equal(view.contiguous().view(torch.int16), layers_first)
    blocks_first = torch.arange(6 * 3 * 8, dtype=torch.int16).reshape(6, 3, 8)
    view = byte_view(named(blocks_first.transpose(0, 1)), 6, joins_layers=joins_layers)
    assert view.shape == ((1, 6, 48) if joins_layers else (3, 6, 16))
    whole = blocks_first.reshape(1, 6, 24) if joins_layers else blocks_first.transpose(0, 1)
    assert torch.equal(view.contiguous().view(torch.int16), whole)
    view[0, 2] = 0  # no copy
    assert int(blocks_first[2, 0].abs().sum()) == 0


def named(layers: Tensor) -> dict[str, Tensor]:
    return {f"layer {i}": each for i, each in enumerate(layers)}


POOL = torch.zeros(4, 6, 8, 8)
UNKNOWN: dict[str, tuple[Mapping[str, Tensor], str]] = {
    "allocations": ({"a": torch.zeros(6, 8), "b": torch.zeros(6, 8)}, "several allocations"),
    "shape": ({"a": POOL[0], "b": POOL[1, :, :4]}, "differ in shape"),
    "strides": ({"a": POOL[0], "b": POOL[1].transpose(1, 2)}, "differ in shape"),
    "blocks": (named(POOL[:, :5]), "has 5 blocks, the scheduler 6"),
    "dense": (named(POOL[:, :, :, ::2]), "not one piece"),
    "spaced": ({"a": POOL[0], "b": POOL[1], "c": POOL[3]}, "not evenly spaced"),
}


@pytest.mark.parametrize("why", UNKNOWN)
def test_a_cache_of_another_shape_is_refused_by_what_is_other(why: str) -> None:
    caches, said = UNKNOWN[why]
    with pytest.raises(ModelError, match=f"not laid out as we know it: .*{said}"):
        byte_view(caches, 6, joins_layers=True)


# ---- ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_ranks", "num_heads", "of_each", "expected"), [(1, 5, 5, 1), (2, 8, 4, 1), (4, 2, 1, 2), (8, 1, 1, 8)]
)
def test_ranks_that_have_one_head_are_counted(num_ranks: int, num_heads: int, of_each: int, expected: int) -> None:
    assert num_holders(num_ranks, num_heads, replace(KEPT, num_kv_heads=of_each)) == expected


def test_parts_that_make_no_block_are_refused() -> None:
    flat = replace(KEPT, is_head_major=False)
    assert num_holders(1, 2, flat) == 1
    with pytest.raises(UnsupportedModel, match=r"2 ranks' parts .* no neighbours"):
        num_holders(2, 4, flat)
    for num_ranks, num_heads in ((2, 3), (3, 4)):  # heads of each are two
        with pytest.raises(UnsupportedModel, match=f"{num_heads} KV heads are not divided evenly among {num_ranks}"):
            num_holders(num_ranks, num_heads, KEPT)


SAID = RankCache("0123456789abcdef", "amx", "", "CPU_ATTN", is_batch_invariant=False)


def ranks(num_ranks: int, deaf: int = -1) -> tuple[list[Tensor], Callable[[int], None]]:
    """Caches, and what has each rank mark a block of its own; what rank `deaf` writes goes to another memory."""
    caches = [torch.zeros(3, NUM_BLOCKS, 16, dtype=torch.uint8) for _ in range(num_ranks)]

    def mark(block_id: int) -> None:
        for rank, cache in enumerate(caches):
            (cache.clone() if rank == deaf else cache)[:, block_id] = rank + 1

    return caches, mark


def test_ranks_whose_writes_are_seen_are_one_cache() -> None:
    caches, mark = ranks(3)
    seen, said = gather_ranks([(cache, SAID) for cache in caches], mark)
    assert [each.data_ptr() for each in seen] == [each.data_ptr() for each in caches]
    assert said == SAID
    assert not any(bool(each.any()) for each in caches)  # nor is a mark left


def test_a_rank_that_is_not_seen_is_refused_by_its_number() -> None:
    caches, mark = ranks(3, deaf=1)
    with pytest.raises(ModelError, match="what rank 1 writes to its cache is not seen"):
        gather_ranks([(cache, SAID) for cache in caches], mark)


def test_ranks_in_another_order_are_refused() -> None:
    caches, mark = ranks(2)
    with pytest.raises(ModelError, match="what rank 0 writes"):
        gather_ranks([(cache, SAID) for cache in reversed(caches)], mark)


@pytest.mark.parametrize(
    "other",
    [
        {"packing": "fedcba9876543210"},
        {"isa": "vec"},
        {"scales": "6df06853657c4235"},
        {"attention_backend": "FLASH_ATTN"},
        {"is_batch_invariant": True},
    ],
    ids=lambda other: next(iter(other)),
)
def test_ranks_that_say_different_things_are_refused(other: dict[str, str]) -> None:
    caches, mark = ranks(2)
    said = [SAID, replace(SAID, **other)]  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="in different ways") as refusal:
        gather_ranks(list(zip(caches, said, strict=True)), mark)
    assert all(str(value) in str(refusal.value) for value in other.values())


def test_scales_are_told_apart_by_each_layer_s_keys_and_values() -> None:
    scales = [[(1.0, 1.0)] * 2, [(1.0, 0.5), (1.0, 1.0)], [(0.5, 1.0), (1.0, 1.0)], [(1.0, 1.0), (1.0, 0.5)]]
    digests = [scales_digest(each) for each in scales]
    assert len({*digests, scales_digest([(1.0, 1.0)])}) == 5
    assert digests == [scales_digest(each) for each in scales]
    assert {len(each) for each in digests} == {16}


# ---- books and draws --------------------------------------------------------------------------


def test_books_that_agree_are_fine_and_each_way_of_not_agreeing_is_named() -> None:
    counts, holders = {1: 2, 2: 1, 3: 0}, [[1, 2], [1]]
    check_books(counts, holders, 1, [])
    for wrong, said in (
        (lambda: check_books({**counts, 1: 3}, holders, 1, []), "block 1 has 3 references, 2 are held"),
        (lambda: check_books(counts, [[1, 2]], 1, []), "block 1 has 2 references, 1 are held"),
        (lambda: check_books(counts, [*holders, [3]], 1, []), "block 3 has 0 references, 1 are held"),
        (lambda: check_books(counts, holders, 2, []), "1 blocks have no reference, 2 are free"),
        (lambda: check_books(counts, holders, 1, [BlockHash(b"\7" * 16)]), f"{'07' * 16} is told to be findable"),
    ):
        with pytest.raises(EngineError, match=said):
            wrong()


def test_a_draw_depends_on_its_seed_and_its_place_alone() -> None:
    generator = PlacedGenerator()

    def draw(seed: int, position: int) -> list[int]:
        return torch.randint(1 << 30, (8,), generator=generator.place(seed, position)).tolist()

    places = [(seed, position) for seed in (-1, 0, 5, 2**63 - 1, -(2**63)) for position in (0, 1, 7, 40_000)]
    first = {place: draw(*place) for place in places}
    assert len({tuple(each) for each in first.values()}) == len(places)
    assert {place: draw(*place) for place in reversed(places)} == first
    other = PlacedGenerator()  # another worker's
    other.manual_seed(9)
    generator = other
    assert draw(5, 7) == first[5, 7]


def test_a_draw_may_be_taken_back_as_engines_do_on_gpus() -> None:
    """Which generators of CPUs refuse; the next draw has a place of its own, so that there is nothing to do."""
    generator = PlacedGenerator().place(3, 4)
    expected = torch.rand(4, generator=generator.place(3, 5))
    torch.rand(4, generator=generator.place(3, 4))
    assert generator.set_offset(generator.get_offset() - 4) is generator
    assert torch.equal(torch.rand(4, generator=generator.place(3, 5)), expected)
