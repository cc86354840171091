"""Defines the prefix index's values: tiers, holdings, changes to be written, and a lookup's reply.

Pure: no Redis, no clock. The bytes here are those of `scripts`:

    key      8 bytes   the first half of a block hash. 64 bits suffice for a hint: the owner compares whole hashes.
    change   9 bytes   key, then (tiers to clear) << 4 | (tiers to set)
    entry    2 bytes   big endian: slot of the holder << 4 | tiers; a block's value is its entries in order of slot
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from kvstore.block import BlockHash

KEY_BYTES = 8
NUM_SLOTS = 4095  # holders at a time, the dead that still have entries included: what an entry's 12 bits can name


class Tier(IntEnum):
    """The place where a holder keeps a block; the lower, the nearer to its use."""

    DEVICE = 0  # the worker's paged cache
    HOST = 1  # the worker's host memory
    STORE = 2  # a store node's DRAM
    DISK = 3  # a store node's disk


NUM_TIERS = len(Tier)
_ALL_TIERS = (1 << NUM_TIERS) - 1
_ABSENT = NUM_TIERS
# The best (lowest) tier of a set of tiers: the position of its lowest bit.
_BEST_TIER = np.array([_ABSENT] + [(bits & -bits).bit_length() - 1 for bits in range(1, _ALL_TIERS + 1)], np.uint8)


@dataclass(frozen=True)
class Holding:
    """The part of a prompt's prefix that one holder has, as far as the index knows.

    `num_blocks` counts from the first hash asked for and stops at the holder's first gap; `num_per_tier[tier]` of them
    are in `tier`, each counted once, in the best tier that has it.
    """

    holder_id: str
    incarnation: str
    num_blocks: int
    num_per_tier: tuple[int, int, int, int]


class PendingChanges:
    """The net effect, per block, of the changes that are not written yet. Bounded.

    What is kept per block is (tiers to clear, tiers to set). Applying it gives what the single changes would have given
    in their order, and applying it twice changes nothing.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._changes: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._changes)

    def add(self, hashes: Sequence[BlockHash], tier: Tier) -> bool:
        """Note that the blocks are in `tier` now. False: that was too much, and *all* changes are forgotten."""
        return self._amend(hashes, 1 << tier, 1 << (tier + NUM_TIERS))

    def remove(self, hashes: Sequence[BlockHash], tier: Tier) -> bool:
        """Note that the blocks are in `tier` no more. False: that was too much, and *all* changes are forgotten."""
        return self._amend(hashes, 1 << (tier + NUM_TIERS), 1 << tier)

    def take(self, max_blocks: int) -> bytes:
        """Remove and return up to `max_blocks` changes, oldest first, as the scripts read them."""
        keys = list(itertools.islice(self._changes, max_blocks))
        return b"".join(key + bytes((self._changes.pop(key),)) for key in keys)

    def clear(self) -> None:
        """Forget all changes."""
        self._changes.clear()

    def _amend(self, hashes: Sequence[BlockHash], to_note: int, to_forget: int) -> bool:
        changes = self._changes
        for block_hash in hashes:
            key = block_hash[:KEY_BYTES]
            changes[key] = changes.get(key, 0) & ~to_forget | to_note
        if len(changes) <= self._max_blocks:
            return True
        changes.clear()
        return False


def encode_snapshot(blocks: Iterable[tuple[BlockHash, Tier]]) -> bytes:
    """Return the changes that announce `blocks`; a block may appear once per tier."""
    return b"".join(block_hash[:KEY_BYTES] + bytes((1 << tier,)) for block_hash, tier in blocks)


def encode_keys(hashes: Sequence[BlockHash]) -> bytes:
    """Return the keys of a lookup."""
    return b"".join([block_hash[:KEY_BYTES] for block_hash in hashes])


def decode_holders(flat: Sequence[bytes]) -> dict[int, tuple[str, str]]:
    """Return slot -> (holder id, incarnation) from the table's flat reply; what is malformed is left out."""
    holders: dict[int, tuple[str, str]] = {}
    for slot, record in zip(flat[0::2], flat[1::2], strict=False):
        parts = record.decode(errors="replace").split(" ", 2)  # token, incarnation, holder id
        if len(parts) == 3 and slot.isdigit() and 0 < int(slot) <= NUM_SLOTS:
            holders[int(slot)] = (parts[2], parts[1])
    return holders


def decode_holdings(runs: Sequence[tuple[int, bytes]], holders: Mapping[int, tuple[str, str]]) -> list[Holding]:
    """Return who of `holders` has how long a prefix, longest first; equal ones nearest tier first, then by id.

    `runs` are (number of consecutive blocks, their common value), from the first block to the first that nobody has.
    Entries of slots that `holders` lacks belong to the dead and count for nothing.
    """
    if not runs:
        return []
    counts = np.array([count for count, _ in runs], np.int64)
    entries = np.frombuffer(b"".join(value for _, value in runs), ">u2").astype(np.int64)
    row_of_entry = np.repeat(np.arange(len(runs)), [len(value) // 2 for _, value in runs])
    slot_of_entry, tiers_of_entry = entries >> NUM_TIERS, entries & _ALL_TIERS

    # One column per living holder of the first block: nobody else has a prefix.
    slots = [slot for slot in dict.fromkeys(slot_of_entry[row_of_entry == 0].tolist()) if slot in holders]
    if not slots:
        return []
    column_of_slot = np.full(NUM_SLOTS + 1, -1)
    column_of_slot[slots] = np.arange(len(slots))
    column_of_entry = column_of_slot[slot_of_entry]
    known = column_of_entry >= 0

    best_tier = np.full((len(runs), len(slots)), _ABSENT, np.uint8)
    best_tier[row_of_entry[known], column_of_entry[known]] = _BEST_TIER[tiers_of_entry[known]]
    in_prefix = np.logical_and.accumulate(best_tier != _ABSENT, axis=0)
    num_per_tier = np.stack([counts @ (in_prefix & (best_tier == tier)) for tier in Tier], axis=1)

    found = []
    for slot, row in zip(slots, num_per_tier.tolist(), strict=True):
        if num_blocks := sum(row):
            holder_id, incarnation = holders[slot]
            found.append(Holding(holder_id, incarnation, num_blocks, (row[0], row[1], row[2], row[3])))
    found.sort(key=lambda held: (-held.num_blocks, [-number for number in held.num_per_tier], held.holder_id))
    return found
