"""Worker records: what goes into the registry comes out equal, and garbage comes out as one error."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import InvalidRecord
from kvstore.registry import new_incarnation
from kvstore.registry.worker_record import MAX_RECORD_BYTES, decode_record, encode_record
from tests.worker_records import worker_record

RECORD = worker_record(
    served_model_names=("tandem-demo", "demo"), transports=("nixl", "ucxx"), version="0.1.0", started_unix_s=1.5
)


def changed(**fields: object) -> bytes:
    return json.dumps({**json.loads(encode_record(RECORD)), **fields}).encode()


def test_a_record_survives_its_wire_form():
    assert decode_record(encode_record(RECORD)) == RECORD
    assert encode_record(decode_record(encode_record(RECORD))) == encode_record(RECORD)


def test_a_field_of_a_newer_version_is_skipped_and_an_optional_one_may_be_missing():
    wire = json.loads(changed(zone="a"))
    del wire["version"]
    assert decode_record(json.dumps(wire).encode()) == msgspec.structs.replace(RECORD, version="")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("worker_id", ""),
        ("worker_id", "two words"),
        ("worker_id", "a\nb"),
        ("worker_id", "x" * 1000),
        ("role", "router"),
        ("role", None),
        ("incarnation", ""),
        ("served_model_names", []),
        ("served_model_names", [""]),
        ("served_model_names", "demo"),
        ("grpc_address", ""),
        ("num_blocks", 0),
        ("num_blocks", "512"),
        ("num_blocks", 1.5),
        ("block_size", -32),
        ("draining", 1),
        ("transports", [1]),
    ],
)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(InvalidRecord, match=field):
        decode_record(changed(**{field: value}))


def test_a_missing_field_is_refused_by_name():
    wire = json.loads(encode_record(RECORD))
    del wire["kv_address"]
    with pytest.raises(InvalidRecord, match="kv_address"):
        decode_record(json.dumps(wire).encode())


@given(st.binary(max_size=200) | st.just(b"[" * 60_000) | st.just(b'"' + b"a" * MAX_RECORD_BYTES + b'"'))
def test_garbage_raises_our_error_and_no_other(data):
    with pytest.raises(InvalidRecord):
        decode_record(data)


def test_a_store_node_needs_no_grpc_address_and_no_limits_but_an_address_to_fetch_from():
    wire = {"role": "store", "grpc_address": "", "max_model_len": 0, "max_num_seqs": 0, "layout": {"num_layers": 2}}
    store = decode_record(changed(**wire))
    assert decode_record(encode_record(store)) == store
    with pytest.raises(InvalidRecord, match="kv_address"):
        decode_record(changed(**wire, kv_address=""))


def test_construction_checks_as_well():
    with pytest.raises(ValueError, match="max_num_seqs must be at least 1"):
        msgspec.structs.replace(RECORD, max_num_seqs=0)


def test_later_incarnations_sort_after_earlier_ones_and_none_are_equal():
    times_ns = [0, 1, 15, 16, 10**18, 10**18 + 1, 1_900_000_000 * 10**9]
    incarnations = [new_incarnation(lambda ns=ns: ns) for ns in times_ns]
    assert incarnations == sorted(incarnations)
    assert len({len(incarnation) for incarnation in incarnations}) == 1
    assert new_incarnation(lambda: 5) != new_incarnation(lambda: 5)


def test_a_worker_that_starts_may_not_know_its_model_yet():
    wire = {"phase": "loading", "model_fingerprint": "", "grpc_address": "", "num_blocks": 0, "max_model_len": 0}
    starting = decode_record(changed(**wire))
    assert decode_record(encode_record(starting)) == starting
    with pytest.raises(InvalidRecord, match="model_fingerprint"):
        decode_record(changed(**wire | {"phase": ""}))
    with pytest.raises(InvalidRecord, match="worker_id"):
        decode_record(changed(**wire, worker_id=""))
