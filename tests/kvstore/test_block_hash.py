"""Block identity: the values are fixed for good, and different inputs never encode equal."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import (
    HASH_BYTES,
    extend_hashes,
    hash_blocks,
    namespace,
)

ROOT = namespace("f" * 32)

texts = st.text(max_size=8)


def reference(root: bytes, token_ids: list[int], block_size: int) -> list[bytes]:
    """The definition, one token at a time."""
    hashes = []
    parent = root
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        tokens = b"".join(token.to_bytes(4, "little") for token in token_ids[start : start + block_size])
        parent = hashlib.blake2b(parent + tokens, digest_size=16, person=b"tandem.block.1").digest()
        hashes.append(parent)
    return hashes


def test_golden_values_hold_for_ever():
    assert namespace("").hex() == "db9597f5e24886b6e2e3557c81610465"
    assert namespace("abc", "salt", "adapter").hex() == "df3cb85549889b3f802e479c75f6f929"
    hashes = hash_blocks(namespace("abc"), [0, 1, 2, 3, 2**32 - 1, 5, 6, 7, 8], 4)
    assert [block_hash.hex() for block_hash in hashes] == [
        "c960ef06df386c83620e00c88667077d",
        "ce66181146f64a09ab78d072d4d30091",
    ]


def test_another_process_with_another_hash_seed_computes_the_same_values():
    code = "from kvstore.block.hash import *; print(hash_blocks(namespace('abc'), list(range(64)), 32)[-1].hex())"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
        timeout=150,
    )
    assert printed.stdout.strip() == hash_blocks(namespace("abc"), list(range(64)), 32)[-1].hex()


@given(st.lists(st.integers(0, 2**32 - 1), max_size=70), st.integers(1, 33))
def test_hashes_are_the_chain_over_parent_and_tokens(token_ids, block_size):
    assert hash_blocks(ROOT, token_ids, block_size) == reference(ROOT, token_ids, block_size)


@given(st.tuples(texts, texts, texts), st.tuples(texts, texts, texts))
def test_different_namespaces_have_different_roots(left, right):
    assert (namespace(*left) == namespace(*right)) == (left == right)


def test_parts_of_a_namespace_do_not_run_into_each_other():
    roots = {
        namespace("ab", "c"),
        namespace("a", "bc"),
        namespace("abc"),
        namespace("", "abc"),
        namespace("", "", "abc"),
    }
    assert len(roots) == 5
    assert namespace("a", "\ud800") != namespace("a", "\ud801")  # lone surrogates come in through JSON


def test_equal_tokens_after_different_prefixes_hash_differently():
    first, second = hash_blocks(ROOT, [1, 2, 1, 2], 2)
    assert first != second
    assert hash_blocks(namespace("f" * 32, "tenant"), [1, 2], 2) != [first]
    assert hash_blocks(ROOT, [2, 1], 2) != [first]


def test_a_block_of_two_tokens_is_not_two_blocks_of_one():
    assert hash_blocks(ROOT, [1, 2], 2)[-1] != hash_blocks(ROOT, [1, 2], 1)[-1]


@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.lists(st.integers(0, 60), max_size=6))
def test_extending_step_by_step_equals_hashing_at_once(token_ids, lengths):
    hashes: list[bytes] = []
    for length in [*sorted(lengths), len(token_ids)]:
        extend_hashes(ROOT, hashes, token_ids[:length], 4)
        assert len(hashes) == min(length, len(token_ids)) // 4
    assert hashes == hash_blocks(ROOT, token_ids, 4)


def test_lists_tuples_and_arrays_of_any_integer_type_hash_alike():
    expected = hash_blocks(ROOT, [3, 1, 4, 1, 5, 9, 2, 6], 4)
    assert hash_blocks(ROOT, (3, 1, 4, 1, 5, 9, 2, 6), 4) == expected
    for dtype in ("<i8", ">i4", "<u4", "u1"):
        assert hash_blocks(ROOT, np.array([3, 1, 4, 1, 5, 9, 2, 6], dtype), 4) == expected
    assert all(len(block_hash) == HASH_BYTES for block_hash in expected)


@pytest.mark.parametrize(
    "bad", [[-1, 0], [0, 2**32], [0, 2**70], [0.0, 1.0], ["0", "1"], [[0], [1]], np.array([-1, 1])]
)
def test_what_is_no_token_id_is_refused_and_does_not_wrap(bad):
    with pytest.raises(ValueError, match="token ids must"):
        hash_blocks(ROOT, bad, 2)


def test_a_block_size_below_one_is_refused():
    with pytest.raises(ValueError, match="block_size must be at least 1, not 0"):
        hash_blocks(ROOT, [1], 0)
