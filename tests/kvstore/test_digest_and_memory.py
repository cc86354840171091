"""The payload digest against its definition, and the pool in main memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import BlockMemory, HostMemory, multipliers
from kvstore.block.digest import digest_rows


def reference_multipliers(num_words: int) -> list[int]:
    """SplitMix64 in plain integers."""
    mask = 2**64 - 1
    table = []
    for counter in range(1, num_words + 1):
        z = (0x74616E64656D2E31 + counter * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        table.append((z ^ (z >> 31)) | 1)
    return table


def reference_digest(block: bytes) -> int:
    words = [int.from_bytes(block[i : i + 8], "little") for i in range(0, len(block), 8)]
    return sum(m * w for m, w in zip(reference_multipliers(len(words)), words, strict=True)) % 2**64


def digest_bytes(block: bytes) -> int:
    return digest_rows(np.frombuffer(block, "<i8").reshape(1, -1))[0]


def random_memory(num_blocks: int = 8, block_bytes: int = 256, seed: int = 0) -> HostMemory:
    memory = HostMemory.allocate(num_blocks, block_bytes)
    memory.array[:] = np.random.default_rng(seed).integers(0, 256, memory.array.shape, dtype=np.uint8)
    return memory


def test_golden_values_hold_for_ever():
    assert [int(value) & (2**64 - 1) for value in multipliers(3)] == [
        0xB3E462C83326025F,
        0xEB1949DC4FCB453,
        0xFBEA5E55FE4B637F,
    ]
    assert digest_bytes(bytes(range(64))) == 0xED7E881FB89E6A80


def test_multipliers_are_odd_fixed_and_prefixes_of_each_other():
    assert [int(value) & (2**64 - 1) for value in multipliers(1000)] == reference_multipliers(1000)
    assert np.all(multipliers(1000) & 1)
    assert np.array_equal(multipliers(10), multipliers(1000)[:10])
    assert multipliers(10) is multipliers(10)
    with pytest.raises(ValueError, match="read-only"):
        multipliers(10)[0] = 1


@given(st.binary(min_size=8, max_size=200).map(lambda data: data[: len(data) // 8 * 8]))
def test_digest_equals_the_definition_in_big_integers(block):
    assert digest_bytes(block) == reference_digest(block)


def test_digest_of_extreme_words_wraps_as_the_definition_does():
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        assert digest_bytes(bytes([byte]) * 4096) == reference_digest(bytes([byte]) * 4096)


@given(st.binary(min_size=64, max_size=64), st.integers(0, 64 * 8 - 1))
def test_any_single_flipped_bit_changes_the_digest(block, bit):
    flipped = bytearray(block)
    flipped[bit // 8] ^= 1 << (bit % 8)
    assert digest_bytes(bytes(flipped)) != digest_bytes(block)


def test_every_bit_of_a_block_counts():
    block = random_memory(1, 256).array[0].tobytes()
    expected = digest_bytes(block)
    for bit in range(256 * 8):
        flipped = bytearray(block)
        flipped[bit // 8] ^= 1 << (bit % 8)
        assert digest_bytes(bytes(flipped)) != expected


def test_swapped_words_and_shifted_payloads_change_the_digest():
    words = random_memory(1, 512).array.view("<i8")
    expected = digest_rows(words)[0]
    swaps = 0
    for left in range(64):
        for right in range(left):
            swapped = words.copy()
            swapped[0, [left, right]] = swapped[0, [right, left]]
            assert digest_rows(swapped)[0] != expected
            swaps += 1
    assert swaps == 64 * 63 // 2
    assert all(digest_rows(np.roll(words, shift, axis=1))[0] != expected for shift in range(1, 64))


def test_a_torn_write_is_noticed_at_every_length():
    old, new = random_memory(1, 512, seed=1).array, random_memory(1, 512, seed=2).array
    digests = set()
    for num_bytes in range(513):
        torn = old.copy()
        torn[:, :num_bytes] = new[:, :num_bytes]
        digests.add(digest_rows(torn.view("<i8"))[0])
    changes = 1 + int(np.count_nonzero(old != new))
    assert len(digests) == changes


def test_strided_and_contiguous_input_give_the_same_digest():
    words = np.random.default_rng(3).integers(-(2**63), 2**63 - 1, (6, 40), dtype=np.int64)
    assert digest_rows(words[::2, 4:20]) == digest_rows(np.ascontiguousarray(words[::2, 4:20]))
    assert digest_rows(np.asfortranarray(words)) == digest_rows(words)


def test_digest_refuses_words_of_another_type():
    with pytest.raises(ValueError, match="expected int64 words"):
        digest_rows(np.zeros((2, 8), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one 8-byte word"):
        digest_rows(np.zeros((2, 0), np.int64))


def test_memory_digests_blocks_in_the_order_asked_for():
    memory: BlockMemory = random_memory()
    expected = [reference_digest(bytes(memory.view(i))) for i in (5, 0, 5, 7)]
    assert memory.digests([5, 0, 5, 7]) == expected
    assert memory.digests([]) == []


def test_a_view_is_the_pools_own_memory():
    memory = random_memory(4, 64)
    memory.view(2)[:] = 9
    assert memory.array[2].tolist() == [9] * 64
    assert memory.view(3).ctypes.data == memory.address + 3 * 64
    assert (memory.num_blocks, memory.block_bytes, memory.device) == (4, 64, "cpu")


def test_an_allocated_pool_is_zeroed_and_page_aligned():
    memory = HostMemory.allocate(3, 4096 + 8)
    assert memory.address % 4096 == 0
    assert not memory.array.any()


@pytest.mark.parametrize("block_id", [-1, 4, 2**40])
def test_a_block_outside_the_pool_is_refused(block_id):
    memory = random_memory(4, 64)
    with pytest.raises(IndexError, match="outside this pool of 4"):
        memory.view(block_id)
    with pytest.raises(IndexError, match="outside this pool of 4"):
        memory.digests([0, block_id])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 12), np.uint8),
        np.zeros((0, 8), np.uint8),
        np.zeros((4, 8), np.int8),
        np.zeros(32, np.uint8),
        np.zeros((4, 16), np.uint8)[:, ::2],
        np.frombuffer(bytes(32), np.uint8).reshape(4, 8),
    ],
    ids=["odd size", "no blocks", "signed", "flat", "strided", "read-only"],
)
def test_an_array_that_cannot_be_a_pool_is_refused(array):
    with pytest.raises(ValueError, match="expected"):
        HostMemory(array)
