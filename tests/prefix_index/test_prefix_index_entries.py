"""Coalesced changes against the single ones, and decoded lookups against a dumb count, by the hundred."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.index import Tier
from kvstore.index.entries import (
    Holding,
    PendingChanges,
    decode_holders,
    decode_holdings,
    encode_keys,
    encode_snapshot,
)
from tests.prefix_index.index_world import block_hashes

HASHES = block_hashes(4)


def encode_value(tiers_of_slot: dict[int, set[Tier]]) -> bytes:
    return b"".join(
        (slot << 4 | sum(1 << tier for tier in tiers)).to_bytes(2, "big")
        for slot, tiers in sorted(tiers_of_slot.items())
    )


def apply(changes: bytes, tiers_of_key: dict[bytes, int]) -> None:
    for i in range(0, len(changes), 9):
        key, masks = changes[i : i + 8], changes[i + 8]
        tiers_of_key[key] = tiers_of_key.get(key, 0) & ~(masks >> 4) | masks & 15


@given(
    before=st.dictionaries(st.sampled_from(HASHES), st.integers(0, 15)),
    steps=st.lists(st.tuples(st.booleans(), st.sampled_from(HASHES), st.sampled_from(Tier)), max_size=12),
    batch=st.integers(1, 4),
    repeats=st.integers(1, 2),
)
@settings(max_examples=300, deadline=None)
def test_the_net_changes_have_the_effect_of_the_single_ones_in_order(before, steps, batch, repeats):
    pending = PendingChanges(100)
    truth = {block_hash[:8]: tiers for block_hash, tiers in before.items()}
    written = dict(truth)
    for is_added, block_hash, tier in steps:
        assert (pending.add if is_added else pending.remove)([block_hash], tier)
        old = truth.get(block_hash[:8], 0)
        truth[block_hash[:8]] = old | 1 << tier if is_added else old & ~(1 << tier)
    while pending:
        changes = pending.take(batch)
        assert len(changes) <= 9 * batch
        for _ in range(repeats):
            apply(changes, written)
    assert {key: tiers for key, tiers in written.items() if tiers} == {k: tiers for k, tiers in truth.items() if tiers}


def test_too_many_changes_are_forgotten_together_and_said_so():
    pending = PendingChanges(3)
    assert pending.add(HASHES[:3], Tier.DEVICE)
    assert pending.remove(HASHES[:3], Tier.HOST)
    assert not pending.add(HASHES[3:], Tier.DEVICE)
    assert len(pending) == 0


def test_a_snapshot_sets_and_never_clears():
    assert encode_snapshot([(HASHES[0], Tier.DISK), (HASHES[1], Tier.DEVICE)]) == (
        HASHES[0][:8] + b"\x08" + HASHES[1][:8] + b"\x01"
    )
    assert encode_keys(HASHES) == b"".join(block_hash[:8] for block_hash in HASHES)


blocks = st.lists(
    st.dictionaries(
        st.sampled_from([1, 2, 3, 700, 4095]), st.sets(st.sampled_from(Tier), min_size=1), min_size=1, max_size=5
    ),
    max_size=8,
)


@given(
    blocks=blocks, repeats=st.lists(st.integers(1, 3), min_size=8, max_size=8), dead=st.sets(st.sampled_from([1, 700]))
)
@settings(max_examples=300, deadline=None)
def test_a_decoded_lookup_is_what_counting_block_by_block_gives(blocks, repeats, dead):
    holders = {slot: (f"w{slot}", "i") for slot in (1, 2, 3, 700, 4095) if slot not in dead}
    runs = [(repeat, encode_value(block)) for repeat, block in zip(repeats, blocks, strict=False)]
    wanted = set()
    for slot, (holder_id, incarnation) in holders.items():
        num_per_tier = [0, 0, 0, 0]
        for repeat, block in zip(repeats, blocks, strict=False):
            if slot not in block:
                break
            num_per_tier[min(block[slot])] += repeat
        if sum(num_per_tier):
            wanted.add(Holding(holder_id, incarnation, sum(num_per_tier), tuple(num_per_tier)))
    found = decode_holdings(runs, holders)
    assert set(found) == wanted
    assert len(found) == len(wanted)
    assert [held.num_blocks for held in found] == sorted((held.num_blocks for held in found), reverse=True)


@given(
    runs=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 6).flatmap(lambda n: st.binary(min_size=2 * n, max_size=2 * n)))
    ),
    flat=st.lists(st.binary(max_size=12)),
)
@settings(max_examples=200, deadline=None)
def test_garbage_decodes_to_something_harmless(runs, flat):
    holders = decode_holders(flat) | {1: ("w1", "i")}
    for held in decode_holdings(runs, holders):
        assert 0 < held.num_blocks == sum(held.num_per_tier) <= sum(count for count, _ in runs)


def test_of_equal_prefixes_the_nearer_tier_comes_first():
    value = encode_value({1: {Tier.DISK}, 2: {Tier.DEVICE}, 3: {Tier.HOST, Tier.STORE}, 4: {Tier.DEVICE}})
    found = decode_holdings([(2, value)], {slot: (f"w{slot}", "i") for slot in (4, 3, 2, 1)})
    assert [held.holder_id for held in found] == ["w2", "w4", "w3", "w1"]
    assert found[2].num_per_tier == (0, 2, 0, 0)


def test_a_holder_id_may_contain_anything_but_the_table_must_be_well_formed():
    flat = [b"7", b"token.1 i7 decode 7 on host", b"x", b"t i w", b"0", b"t i w", b"5000", b"t i w", b"8", b"rubbish"]
    assert decode_holders(flat) == {7: ("decode 7 on host", "i7")}
