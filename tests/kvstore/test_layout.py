"""Block layout: sizes, the wire form, and the refusal of a peer whose blocks mean something else."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import BlockLayout
from kvstore.errors import IncompatibleLayout, InvalidLayout, KVStoreError

LAYOUT = BlockLayout(
    num_layers=24, num_kv_heads=2, block_size=32, head_dim=64, dtype="bfloat16", model_fingerprint="0123abcd"
)

# Blocks of an engine that fuses keys and values and packs them for its processor.
FOREIGN = dataclasses.replace(LAYOUT, engine="vllm", kernel_layout="LHNC", isa="amx", attention_backend="CPU_ATTN")
LATENT = dataclasses.replace(FOREIGN, num_kv_heads=1, head_dim=656, num_vectors=1, dtype="uint8", scales="fp8_ds_mla")
OTHER_VALUES = {
    "num_layers": 23,
    "num_kv_heads": 4,
    "block_size": 16,
    "head_dim": 128,
    "dtype": "float16",
    "model_fingerprint": "0123abce",
    "proof_key": "89ab",
    "engine": "another",
    "kernel_layout": "LNHC",
    "isa": "vec",
    "scales": "tensor:1.0",
    "attention_backend": "FLASH_ATTN",
    "num_vectors": 1,
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def test_a_block_holds_keys_and_values_of_all_layers():
    assert LAYOUT.block_bytes == 24 * 2 * 2 * 32 * 64 * 2
    assert dataclasses.replace(LAYOUT, dtype="float32").block_bytes == 2 * LAYOUT.block_bytes


def test_the_wire_form_is_plain_and_reads_back_equal():
    for layout in (LAYOUT, FOREIGN, LATENT):
        wire = layout.to_wire()
        assert all(type(value) in (int, str) for value in wire.values())
        assert BlockLayout.from_wire(wire) == layout


def test_the_fingerprint_is_fixed_and_differs_with_every_field():
    assert LAYOUT.fingerprint == "2fde666d2653892f5124f8ac4c527a5f"
    variants = [FOREIGN] + [dataclasses.replace(FOREIGN, **{name: value}) for name, value in OTHER_VALUES.items()]
    assert len({variant.fingerprint for variant in variants}) == len(dataclasses.fields(BlockLayout)) + 1


def test_a_native_layout_travels_as_it_did_when_there_was_no_other_engine():
    assert LAYOUT.to_wire() == {
        "num_layers": 24,
        "num_kv_heads": 2,
        "block_size": 32,
        "head_dim": 64,
        "dtype": "bfloat16",
        "model_fingerprint": "0123abcd",
        "version": 1,
        "proof_key": "",
    }
    assert BlockLayout.from_wire(LAYOUT.to_wire()).engine == "native"
    assert {layout.version for layout in (FOREIGN, LATENT, dataclasses.replace(LAYOUT, dtype="float8_e5m2"))} == {2}


def test_blocks_have_the_size_that_is_declared_whatever_their_kind():
    assert FOREIGN.block_bytes == LAYOUT.block_bytes
    assert LATENT.block_bytes == 24 * 32 * 656


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_whatever_differs_is_refused_with_both_values(name: str):
    other = dataclasses.replace(FOREIGN, **{name: OTHER_VALUES[name]})
    ours, theirs = (getattr(layout, name) or "(none)" for layout in (FOREIGN, other))
    with pytest.raises(IncompatibleLayout) as refused:
        FOREIGN.check_compatible(BlockLayout.from_wire(other.to_wire()), "prefill-7")
    assert str(refused.value) == (
        f"blocks of prefill-7 are incompatible with ours: {name}: ours {ours}, theirs {theirs}"
    )


def test_another_engine_is_refused_by_the_native_one_and_the_other_way_round():
    for ours, theirs in ((LAYOUT, FOREIGN), (FOREIGN, LAYOUT)):
        with pytest.raises(IncompatibleLayout, match=f"engine: ours {ours.engine}, theirs {theirs.engine}; kernel"):
            ours.check_compatible(BlockLayout.from_wire(theirs.to_wire()), "prefill-7")


def test_equal_layouts_are_compatible():
    LAYOUT.check_compatible(dataclasses.replace(LAYOUT), "prefill-0")


def test_a_refusal_names_the_peer_and_every_difference_with_both_values():
    peer = dataclasses.replace(LAYOUT, block_size=16, dtype="float32", model_fingerprint="ffff")
    with pytest.raises(IncompatibleLayout) as refused:
        LAYOUT.check_compatible(peer, "prefill-7 (10.0.0.7:4100)")
    assert str(refused.value) == (
        "blocks of prefill-7 (10.0.0.7:4100) are incompatible with ours: block_size: ours 32, theirs 16; "
        "dtype: ours bfloat16, theirs float32; model_fingerprint: ours 0123abcd, theirs ffff"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("num_layers", -1),
        ("num_kv_heads", True),
        ("block_size", 32.0),
        ("block_size", "32"),
        ("head_dim", 2**40),
        ("head_dim", None),
        ("dtype", "float64"),
        ("dtype", ["float32"]),
        ("model_fingerprint", ""),
        ("model_fingerprint", "a\nb"),
        ("model_fingerprint", "x" * 1000),
        ("model_fingerprint", b"0123abcd"),
        ("version", 0),
        ("version", 3),
        ("version", True),
        ("version", [2]),
        ("proof_key", "a\nb"),
        ("proof_key", None),
        ("engine", ""),
        ("kernel_layout", "a\nb"),
        ("isa", None),
        ("scales", "x" * 1000),
        ("attention_backend", 3),
        ("num_vectors", 0),
    ],
)
def test_an_impossible_value_from_a_peer_is_refused_by_name(field, value):
    with pytest.raises(InvalidLayout, match=f"block layout: {field} must be"):
        BlockLayout.from_wire({**FOREIGN.to_wire(), field: value})


def test_what_came_with_a_version_is_refused_in_the_one_before():
    with pytest.raises(InvalidLayout, match="unknown 'engine', 'kernel_layout'"):
        BlockLayout.from_wire({**FOREIGN.to_wire(), "version": 1})
    with pytest.raises(InvalidLayout, match="dtype must be one of float32, bfloat16, float16 in version 1, not uint8"):
        BlockLayout.from_wire({**LAYOUT.to_wire(), "dtype": "uint8"})
    with pytest.raises(InvalidLayout, match="missing engine"):
        BlockLayout.from_wire({**LAYOUT.to_wire(), "version": 2})


def test_workers_with_other_proof_keys_are_refused_by_the_keys_ids():
    peer = dataclasses.replace(LAYOUT, proof_key="89ab")
    with pytest.raises(IncompatibleLayout, match=r"proof_key: ours \(none\), theirs 89ab"):
        LAYOUT.check_compatible(peer, "prefill-7")


def test_missing_and_unknown_fields_are_refused_by_name():
    wire = {**LAYOUT.to_wire(), "num_pages": 3}
    del wire["dtype"]
    with pytest.raises(InvalidLayout, match="missing dtype; unknown 'num_pages'"):
        BlockLayout.from_wire(wire)


@pytest.mark.parametrize("wire", [None, 3, "layout", [], [("num_layers", 1)]])
def test_what_is_no_map_is_refused(wire):
    with pytest.raises(InvalidLayout, match="expected a map"):
        BlockLayout.from_wire(wire)


@given(json_values | st.fixed_dictionaries(dict.fromkeys(FOREIGN.to_wire(), json_values)))
def test_garbage_raises_our_error_and_no_other(wire):
    with pytest.raises(KVStoreError):
        BlockLayout.from_wire(wire)


def test_blocks_that_are_no_whole_words_or_absurdly_large_are_refused():
    with pytest.raises(InvalidLayout, match="no whole number of 8-byte words"):
        BlockLayout(1, 1, 1, 1, "float16", "ab")
    with pytest.raises(InvalidLayout, match="exceeds"):
        BlockLayout(2**10, 2**10, 2**10, 2**10, "float16", "ab")
