"""Files of the disk tier after every kind of damage: what is lost is counted, and what is served is right."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.block import BlockHash
from kvstore.store import DiskTier
from kvstore.store.disk_files import (
    BLOCKS_NAME,
    HEAD_BYTES,
    RECORD_BYTES,
    TABLE_NAME,
    FileCalls,
)
from kvstore.store.disk_results import PutOutcome, StoredBlock
from tests.tiers.blocks import BLOCK_BYTES, LAYOUT, chain, checksum_of, named_hash, parents, payload, proof

BLOCKS = chain("a", 6)
MAX_BYTES = 16 * 12 * 1024
CHECKED_HEAD_BYTES = 64


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with blocks 0 .. 5 in its first slots, closed."""
    directory = tmp_path_factory.mktemp("intact")
    with closing(DiskTier.open(directory, LAYOUT, MAX_BYTES)) as tier:
        for block_hash, parent in zip(BLOCKS, parents(BLOCKS), strict=True):
            assert (
                tier.put(block_hash, parent, proof(block_hash), checksum_of(block_hash), payload(block_hash)).outcome
                is PutOutcome.STORED
            )
    return directory


@pytest.fixture
def damaged(intact: Path, tmp_path: Path) -> Path:
    shutil.copytree(intact, tmp_path / "store")
    return tmp_path / "store"


def read_all(tier: DiskTier) -> dict[BlockHash, bool]:
    """Return which of the blocks are served, having checked that each is served right or not at all."""
    served = {}
    for block_hash, parent in zip(BLOCKS, parents(BLOCKS), strict=True):
        buffer = bytearray(BLOCK_BYTES)
        found = tier.get(block_hash, buffer)
        served[block_hash] = isinstance(found, StoredBlock)
        if isinstance(found, StoredBlock):
            assert bytes(buffer) == payload(block_hash).tobytes()
            assert found == StoredBlock(parent, proof(block_hash), checksum_of(block_hash))
    return served


def rewrite_all(tier: DiskTier) -> None:
    """What was lost can be stored again, and nothing is out of place."""
    for block_hash, parent in zip(BLOCKS, parents(BLOCKS), strict=True):
        outcome = tier.put(block_hash, parent, proof(block_hash), checksum_of(block_hash), payload(block_hash)).outcome
        assert outcome in (PutOutcome.STORED, PutOutcome.PRESENT)
    assert all(read_all(tier).values())
    tier.check_integrity()


# Offsets at the edges of every part of the files, and between.
TABLE_CUTS = {
    "nothing left": 0,
    "in the magic": 5,
    "in the head's checksum": CHECKED_HEAD_BYTES - 1,
    "after the head": CHECKED_HEAD_BYTES,
    "before the records": HEAD_BYTES,
    "in record 0": HEAD_BYTES + 30,
    "after record 0": HEAD_BYTES + RECORD_BYTES,
    "in record 3": HEAD_BYTES + 3 * RECORD_BYTES + 1,
    "after the last record": HEAD_BYTES + 6 * RECORD_BYTES,
}


@pytest.mark.parametrize("size", TABLE_CUTS.values(), ids=TABLE_CUTS.keys())
def test_of_a_truncated_table_just_the_whole_records_are_kept(damaged, size):
    truncate(damaged / TABLE_NAME, size)
    num_whole = max(0, (size - HEAD_BYTES) // RECORD_BYTES)
    with closing(DiskTier.open(damaged, LAYOUT, MAX_BYTES)) as tier:
        assert read_all(tier) == {block_hash: index < num_whole for index, block_hash in enumerate(BLOCKS)}
        report = tier.recovery
        is_torn = size > HEAD_BYTES and (size - HEAD_BYTES) % RECORD_BYTES > 0
        assert (report.num_blocks, report.num_bad_records) == (num_whole, int(is_torn))
        assert report.num_unusable_files == int(size < CHECKED_HEAD_BYTES)
        rewrite_all(tier)


@pytest.mark.parametrize(
    "size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 4 * BLOCK_BYTES + 100, 6 * BLOCK_BYTES - 1, 6 * BLOCK_BYTES]
)
def test_of_truncated_blocks_just_the_whole_ones_are_kept(damaged, size):
    truncate(damaged / BLOCKS_NAME, size)
    num_whole = size // BLOCK_BYTES
    with closing(DiskTier.open(damaged, LAYOUT, MAX_BYTES)) as tier:
        assert read_all(tier) == {block_hash: index < num_whole for index, block_hash in enumerate(BLOCKS)}
        assert (tier.recovery.num_blocks, tier.recovery.num_bad_records) == (num_whole, 6 - num_whole)
        assert tier.stats.num_corrupt == 0
        rewrite_all(tier)


@pytest.mark.parametrize("name", [BLOCKS_NAME, TABLE_NAME])
def test_one_file_without_the_other_is_nothing(damaged, name):
    (damaged / name).unlink()
    with closing(DiskTier.open(damaged, LAYOUT, MAX_BYTES)) as tier:
        assert not any(read_all(tier).values())
        rewrite_all(tier)


def truncate(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bits_anywhere_never_give_wrong_bytes(intact, tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("flipped") / "store"
    shutil.copytree(intact, directory)
    contents = {name: bytearray((directory / name).read_bytes()) for name in (BLOCKS_NAME, TABLE_NAME)}
    places = st.one_of(
        st.tuples(st.just(TABLE_NAME), st.integers(0, CHECKED_HEAD_BYTES)),
        st.tuples(st.just(TABLE_NAME), st.integers(HEAD_BYTES, HEAD_BYTES + 6 * RECORD_BYTES - 1)),
        st.tuples(st.just(BLOCKS_NAME), st.integers(0, 6 * BLOCK_BYTES - 1)),
    )
    flips = st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=6, unique=True)
    for (name, offset), bit in data.draw(flips):
        contents[name][offset] ^= 1 << bit
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    with closing(DiskTier.open(directory, LAYOUT, MAX_BYTES)) as tier:
        num_served = sum(read_all(tier).values())
        lost_at_start = 6 if tier.recovery.num_unusable_files else tier.recovery.num_bad_records
        assert num_served + lost_at_start + tier.stats.num_corrupt == 6
        rewrite_all(tier)
    shutil.rmtree(directory)


def test_a_flipped_bit_in_a_payload_is_found_when_it_is_read_and_dropped_for_good(damaged):
    with open(damaged / BLOCKS_NAME, "r+b") as file:
        file.seek(2 * BLOCK_BYTES + 7)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    with closing(DiskTier.open(damaged, LAYOUT, MAX_BYTES)) as tier:
        assert tier.contains(BLOCKS[2])
        assert [index for index, served in enumerate(read_all(tier).values()) if not served] == [2]
        assert (tier.stats.num_corrupt, tier.contains(BLOCKS[2])) == (1, False)
    with closing(DiskTier.open(damaged, LAYOUT, MAX_BYTES)) as tier:
        assert tier.recovery.num_blocks == 5


def swap(content: bytearray, first: int, second: int, size: int) -> None:
    a, b = content[first : first + size], content[second : second + size]
    content[first : first + size], content[second : second + size] = b, a


@pytest.mark.parametrize(
    ("name", "start", "size", "found_at_start"),
    [(TABLE_NAME, HEAD_BYTES, RECORD_BYTES, True), (BLOCKS_NAME, 0, BLOCK_BYTES, False)],
)
def test_records_and_payloads_in_each_others_place_are_not_served(damaged, name, start, size, found_at_start):
    path = damaged / name
    content = bytearray(path.read_bytes())
    swap(content, start + size, start + 4 * size, size)
    path.write_bytes(content)
    with closing(DiskTier.open(damaged, LAYOUT, MAX_BYTES)) as tier:
        assert [index for index, served in enumerate(read_all(tier).values()) if not served] == [1, 4]
        assert (tier.recovery.num_bad_records, tier.stats.num_corrupt) == ((2, 0) if found_at_start else (0, 2))
        rewrite_all(tier)


@pytest.mark.parametrize(
    "content",
    [b"", b"TANDEMKV", bytes(50_000), b"#!/bin/sh\n" * 5_000, b"TANDEMKV" + b"\xff" * 50_000],
    ids=["empty", "magic only", "zeros", "foreign", "garbage"],
)
def test_what_is_no_table_under_the_tables_name_is_emptied(damaged, content):
    (damaged / TABLE_NAME).write_bytes(content)
    with closing(DiskTier.open(damaged, LAYOUT, MAX_BYTES)) as tier:
        assert (tier.recovery.num_unusable_files, tier.recovery.num_blocks, tier.size_bytes) == (1, 0, 0)
        rewrite_all(tier)


def test_the_files_of_earlier_versions_are_removed(damaged):
    (damaged / "tandem-000000000009.blocks").write_bytes(b"TANDEMKV")
    with closing(DiskTier.open(damaged, LAYOUT, MAX_BYTES)) as tier:
        assert (tier.recovery.num_unusable_files, tier.recovery.num_blocks) == (1, 6)
        assert sorted(path.name for path in damaged.iterdir()) == ["tandem-store.lock", BLOCKS_NAME, TABLE_NAME]
        assert all(read_all(tier).values())


def test_damage_is_found_at_a_start_on_a_full_disk_too(damaged):
    def refuse(fd, buffers, offset):
        raise OSError(errno.ENOSPC, "no space left on device")

    path = damaged / TABLE_NAME
    content = bytearray(path.read_bytes())
    content[HEAD_BYTES + RECORD_BYTES + 3] ^= 1
    path.write_bytes(content)
    with closing(DiskTier.open(damaged, LAYOUT, MAX_BYTES, calls=FileCalls(write=refuse))) as tier:
        assert [index for index, served in enumerate(read_all(tier).values()) if not served] == [1]
        assert tier.recovery.num_bad_records == 1
        tier.check_integrity()


def test_another_format_is_emptied(damaged, monkeypatch):
    monkeypatch.setattr("kvstore.store.disk_files.FORMAT_VERSION", 4)
    with closing(DiskTier.open(damaged, LAYOUT, MAX_BYTES)) as tier:
        assert (tier.recovery.num_unusable_files, len(tier)) == (1, 0)
        rewrite_all(tier)


# Writes numbered blocks for ever, over and over through a store that holds a fraction of them; says each number when
# the block is stored.
WRITER = """
import sys
from pathlib import Path
from kvstore.store.disk_tier import DiskTier
from tests.tiers.blocks import LAYOUT, checksum_of, proof, named_hash, payload
tier = DiskTier.open(Path(sys.argv[1]), LAYOUT, 300_000)
number = int(sys.argv[2])
while True:
    block_hash = named_hash(f"written{number}")
    tier.put(block_hash, None, proof(block_hash), checksum_of(block_hash), payload(block_hash))
    print(number, flush=True)
    number += 1
"""


def numbers_stored_before_kill(directory: Path, first: int, count: int) -> Iterator[int]:
    command = [sys.executable, "-c", WRITER, str(directory), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as child:
        assert child.stdout is not None
        for _ in range(count):
            yield int(child.stdout.readline())
        child.kill()
        for line in child.stdout:
            if line.endswith("\n"):
                yield int(line)


def test_a_process_killed_in_the_midst_of_writing_loses_only_the_block_it_wrote(tmp_path):
    first = 0
    for count in (1, 700, 1500):
        said = list(numbers_stored_before_kill(tmp_path, first, count))
        with closing(DiskTier.open(tmp_path, LAYOUT, 300_000)) as tier:
            assert tier.recovery.num_bad_records <= 1
            kept = [number for number in range(said[-1] + 3) if tier.contains(named_hash(f"written{number}"))]
            for number in kept:
                block_hash, buffer = named_hash(f"written{number}"), bytearray(BLOCK_BYTES)
                assert isinstance(tier.get(block_hash, buffer), StoredBlock)
                assert bytes(buffer) == payload(block_hash).tobytes()
            assert tier.stats.num_corrupt == 0
            # Of what it said it stored nothing is lost; once the store is full, the one that had to make room is.
            if tier._files.can_grow:
                assert set(said) <= set(kept)
            else:
                assert said[-1] in kept
                assert tier._book.num_empty <= 2 or set(said) <= set(kept)
            tier.check_integrity()
        first = said[-1] + 10
    assert first > 2 * len(kept), "the store was never full"
