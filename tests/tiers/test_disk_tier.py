"""The disk tier: what it keeps over restarts, how it stays within its bound, and a disk that fills up or fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvstore.block import BlockHash, Checksum
from kvstore.store import DiskTier
from kvstore.store.directory import DirectoryLocked
from kvstore.store.disk_files import HEAD_BYTES, RECORD_BYTES, FileCalls
from kvstore.store.disk_results import GetFailure, PutOutcome, PutResult, StoredBlock
from kvstore.store.disk_tier import DiskTierClosed
from tests.tiers.blocks import (
    BLOCK_BYTES,
    LAYOUT,
    OTHER_LAYOUT,
    chain,
    checksum_of,
    named_hash,
    parents,
    payload,
    proof,
)

MAX_BYTES = 16 * 12 * 1024  # grows by 12 KiB, 48 blocks


class Disk:
    """System calls that fail when told to, and a clock."""

    def __init__(self) -> None:
        self.write_error: int | None = None
        self.allocate_error: int | None = None
        self.read_error: int | None = None
        self.now = 1000.0

    def calls(self) -> FileCalls:
        return FileCalls(write=self.write, read=self.read, allocate=self.allocate)

    def write(self, fd, buffers, offset):
        if self.write_error is not None:
            raise OSError(self.write_error, os.strerror(self.write_error))
        # Short writes are legal: at most 100 bytes at a time.
        return os.pwritev(fd, [buffers[0][:100]], offset)

    def read(self, fd, buffers, offset):
        if self.read_error is not None:
            raise OSError(self.read_error, os.strerror(self.read_error))
        return os.preadv(fd, [buffers[0][:1000]], offset)

    def allocate(self, fd, offset, length):
        if self.allocate_error is not None:
            raise OSError(self.allocate_error, os.strerror(self.allocate_error))
        os.posix_fallocate(fd, offset, length)


def open_tier(directory: Path, max_bytes: int = MAX_BYTES, layout=LAYOUT, disk: Disk | None = None) -> DiskTier:
    if disk is None:
        return DiskTier.open(directory, layout, max_bytes)
    return DiskTier.open(directory, layout, max_bytes, calls=disk.calls(), clock=lambda: disk.now)


def put(tier: DiskTier, block_hash: BlockHash, parent: BlockHash | None = None) -> PutResult:
    return tier.put(block_hash, parent, proof(block_hash), checksum_of(block_hash), payload(block_hash))


def put_chain(tier: DiskTier, hashes: list[BlockHash]) -> None:
    for block_hash, parent in zip(hashes, parents(hashes), strict=True):
        assert put(tier, block_hash, parent).outcome is PutOutcome.STORED


def assert_reads(tier: DiskTier, block_hash: BlockHash, parent: BlockHash | None = None) -> None:
    buffer = np.full(BLOCK_BYTES, 0xEE, np.uint8)
    assert tier.get(block_hash, buffer) == StoredBlock(parent, proof(block_hash), checksum_of(block_hash))
    assert buffer.tobytes() == payload(block_hash).tobytes()


def test_what_was_put_is_read_back_before_and_after_a_restart(tmp_path):
    a = chain("a", 20)
    with closing(open_tier(tmp_path)) as tier:
        put_chain(tier, a)
        for block_hash, parent in zip(a, parents(a), strict=True):
            assert_reads(tier, block_hash, parent)
        assert (len(tier), sorted(tier.hashes()), tier.stats.num_stored, tier.stats.num_read) == (20, sorted(a), 20, 20)
        tier.check_integrity()
    with closing(open_tier(tmp_path)) as tier:
        assert (tier.recovery.num_blocks, len(tier)) == (20, 20)
        for block_hash, parent in zip(a, parents(a), strict=True):
            assert_reads(tier, block_hash, parent)
        assert put(tier, a[0]) == PutResult(PutOutcome.PRESENT, ())
        tier.check_integrity()


def test_its_files_never_outgrow_the_bound_and_the_coldest_chain_ends_go(tmp_path):
    with closing(open_tier(tmp_path)) as tier:
        hot = chain("hot", 5)
        put_chain(tier, hot)
        for block_hash, parent in zip(hot, parents(hot), strict=True):
            assert_reads(tier, block_hash, parent)
        evicted: set[BlockHash] = set()
        for number in range(1500):
            result = put(tier, named_hash(f"one-off{number}"))
            assert result.outcome is PutOutcome.STORED
            evicted.update(result.evicted)
            assert sum(path.stat().st_size for path in tmp_path.glob("tandem.*")) == tier.size_bytes <= MAX_BYTES
        assert len(evicted) == tier.stats.num_evicted == 1505 - len(tier)
        assert evicted.isdisjoint(tier.hashes())
        assert all(map(tier.contains, hot))
        assert tier.size_bytes > 0.9 * MAX_BYTES
        tier.check_integrity()


def test_a_smaller_bound_at_the_next_start_cuts_the_files_and_a_larger_one_lets_them_grow(tmp_path):
    a = chain("a", 200)
    with closing(open_tier(tmp_path)) as tier:
        put_chain(tier, a)
    with closing(open_tier(tmp_path, MAX_BYTES // 6)) as tier:
        assert sum(path.stat().st_size for path in tmp_path.glob("tandem.*")) == tier.size_bytes <= MAX_BYTES // 6
        num_kept = len(tier)
        assert (num_kept, tier.recovery.num_surplus_blocks) == (tier._files.num_slots, 200 - num_kept)
        for block_hash in tier.hashes():
            assert_reads(tier, block_hash, parents(a)[a.index(block_hash)])
        assert put(tier, named_hash("more")).outcome is PutOutcome.STORED
        tier.check_integrity()
    with closing(open_tier(tmp_path)) as tier:
        assert len(tier) == num_kept
        put_chain(tier, chain("b", 200))
        assert len(tier) == num_kept + 200
        tier.check_integrity()


def test_recency_survives_a_restart_as_the_order_of_writing(tmp_path):
    blocks = [named_hash(f"b{i}") for i in range(2000)]
    with closing(open_tier(tmp_path)) as tier:
        for block_hash in blocks:
            put(tier, block_hash)
        num_kept = len(tier)
    with closing(open_tier(tmp_path)) as tier:
        assert put(tier, named_hash("more")).evicted == (blocks[-num_kept],)


def test_blocks_of_another_layout_are_dropped_and_their_space_is_used(tmp_path):
    with closing(open_tier(tmp_path)) as tier:
        put_chain(tier, chain("a", 60))
    with closing(open_tier(tmp_path, layout=OTHER_LAYOUT)) as tier:
        assert (len(tier), tier.recovery.num_unusable_files) == (0, 1)
        put_chain(tier, chain("a", 3))
    with closing(open_tier(tmp_path)) as tier:
        assert (len(tier), tier.recovery.num_unusable_files) == (0, 1)


def test_files_that_are_not_ours_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "elsewhere").write_text("target of a link")
    (tmp_path / "tandem.blocks").symlink_to(tmp_path / "elsewhere")
    with closing(open_tier(tmp_path)) as tier:
        put_chain(tier, chain("a", 60))
        assert (tier.recovery.num_foreign_files, tier.recovery.num_unusable_files) == (2, 1)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "elsewhere").read_text() == "target of a link"


def test_a_second_opener_is_refused_in_this_process_and_in_another(tmp_path):
    with closing(open_tier(tmp_path)):
        with pytest.raises(DirectoryLocked, match=f"{tmp_path} is in use by another store, process {os.getpid()}"):
            open_tier(tmp_path)
        script = (
            "import sys; from pathlib import Path; from kvstore.store.directory import *\n"
            "try: StoreDirectory(Path(sys.argv[1]))\n"
            "except DirectoryLocked as error: print(error)"
        )
        command = [sys.executable, "-c", script, str(tmp_path)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=150, check=True).stdout
        assert f"process {os.getpid()}; give each store a directory of its own" in said
    open_tier(tmp_path).close()


def test_its_files_are_for_nobody_else_to_read(tmp_path):
    with closing(open_tier(tmp_path / "store")) as tier:
        put_chain(tier, chain("a", 2))
    assert (tmp_path / "store").stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "store").iterdir())


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_writes_still_reads_and_takes_blocks_again_later(tmp_path, error):
    disk = Disk()
    a = chain("a", 3)
    with closing(open_tier(tmp_path, disk=disk)) as tier:
        put_chain(tier, a[:1])
        disk.write_error = error
        assert put(tier, a[1], a[0]) == PutResult(PutOutcome.PAUSED, ())
        assert tier.is_paused
        assert_reads(tier, a[0])
        disk.write_error = None
        disk.now += 4.9
        assert put(tier, a[1], a[0]).outcome is PutOutcome.PAUSED, "not tried again yet"
        disk.now += 0.1
        assert put(tier, a[1], a[0]).outcome is PutOutcome.STORED
        assert (tier.is_paused, tier.stats.num_write_errors) == (False, 1)
        assert_reads(tier, a[1], a[0])
        tier.check_integrity()
    with closing(open_tier(tmp_path)) as tier:
        assert (sorted(tier.hashes()), tier.recovery.num_bad_records) == (sorted(a[:2]), 0)


def test_a_disk_that_takes_no_byte_and_says_no_error_is_one_that_fails(tmp_path):
    num_calls = iter(range(100))  # an endless loop shows as StopIteration

    def write_nothing(fd, buffers, offset):
        next(num_calls)
        return 0

    with closing(DiskTier.open(tmp_path, LAYOUT, MAX_BYTES, calls=FileCalls(write=write_nothing))) as tier:
        block_hash = named_hash("a")
        assert (
            tier.put(block_hash, None, proof(block_hash), checksum_of(block_hash), payload(block_hash)).outcome
            is PutOutcome.PAUSED
        )
        tier.check_integrity()


def test_an_owner_that_cannot_be_named_leaves_the_directory_to_the_next(tmp_path, monkeypatch):
    def full(fd, data, offset):
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="no space"):
            DiskTier.open(tmp_path, LAYOUT, MAX_BYTES)
    DiskTier.open(tmp_path, LAYOUT, MAX_BYTES).close()


def test_a_disk_that_is_full_from_the_start_leaves_nothing_behind(tmp_path):
    disk = Disk()
    disk.allocate_error = errno.ENOSPC
    with closing(open_tier(tmp_path, disk=disk)) as tier:
        assert put(tier, named_hash("a")).outcome is PutOutcome.PAUSED
        assert (len(tier), tier.is_paused, tier.size_bytes) == (0, True, 0)
        assert all(path.stat().st_size == 0 for path in tmp_path.glob("tandem.*"))
        disk.allocate_error = None
        disk.now += 5
        assert put(tier, named_hash("a")).outcome is PutOutcome.STORED
        tier.check_integrity()


def test_a_disk_too_full_to_grow_recycles_the_space_that_it_has(tmp_path):
    disk = Disk()
    with closing(open_tier(tmp_path, disk=disk)) as tier:
        step = MAX_BYTES // 16 // BLOCK_BYTES
        blocks = [named_hash(f"b{i}") for i in range(step + 2)]
        for block_hash in blocks[:step]:
            assert put(tier, block_hash).evicted == ()
        disk.allocate_error = errno.ENOSPC
        assert put(tier, blocks[step]) == PutResult(PutOutcome.STORED, (blocks[0],))
        assert tier._files.num_slots == step
        disk.allocate_error = None
        disk.now += 5
        assert put(tier, blocks[step + 1]) == PutResult(PutOutcome.STORED, ())
        assert tier._files.num_slots == 2 * step
        tier.check_integrity()


def test_an_unreadable_block_is_dropped_and_its_slot_used_again(tmp_path):
    disk = Disk()
    (a,) = chain("a", 1)
    with closing(open_tier(tmp_path, disk=disk)) as tier:
        put(tier, a)
        disk.read_error = errno.EIO
        assert tier.get(a, bytearray(BLOCK_BYTES)) is GetFailure.CORRUPT
        disk.read_error = None
        assert tier.get(a, bytearray(BLOCK_BYTES)) is GetFailure.MISSING
        assert put(tier, a).outcome is PutOutcome.STORED
        assert_reads(tier, a)
        assert tier.stats.num_corrupt == 1
        tier.check_integrity()


def test_a_block_whose_checksum_was_never_right_is_not_served(tmp_path):
    (a,) = chain("a", 1)
    with closing(open_tier(tmp_path)) as tier:
        tier.put(a, None, proof(a), Checksum(checksum_of(a) ^ 1), payload(a))
        assert tier.get(a, bytearray(BLOCK_BYTES)) is GetFailure.CORRUPT
        assert not tier.contains(a)


def test_a_block_that_was_doubted_is_gone_and_stays_gone(tmp_path):
    a, b = chain("a", 2)
    with closing(open_tier(tmp_path)) as tier:
        put(tier, a)
        put(tier, b)
        assert (tier.drop(a), tier.drop(a), tier.hashes()) == (True, False, [b])
        tier.check_integrity()
    with closing(open_tier(tmp_path)) as tier:
        assert tier.hashes() == [b]


def test_blocks_proven_under_another_key_are_misses_and_their_room_is_used(tmp_path):
    a, b = chain("a", 2)
    with closing(open_tier(tmp_path, layout=replace(LAYOUT, proof_key="old"))) as tier:
        put(tier, a)
    with closing(open_tier(tmp_path, layout=replace(LAYOUT, proof_key="new"))) as tier:
        assert (tier.hashes(), tier.recovery.num_unusable_files) == ([], 1)
        assert tier.get(a, bytearray(BLOCK_BYTES)) is GetFailure.MISSING
        put(tier, b)
    with closing(open_tier(tmp_path, layout=replace(LAYOUT, proof_key="new"))) as tier:
        assert tier.hashes() == [b]


def test_a_block_being_read_is_neither_evicted_nor_overwritten(tmp_path):
    disk = Disk()
    one_block = HEAD_BYTES + RECORD_BYTES + BLOCK_BYTES
    a, b = chain("x", 2)
    is_reading, may_go_on = threading.Event(), threading.Event()
    with closing(open_tier(tmp_path, one_block, disk=disk)) as tier:
        assert put(tier, a).outcome is PutOutcome.STORED
        plain_read = tier._files._calls.read

        def slow_read(fd, buffers, offset):
            is_reading.set()
            assert may_go_on.wait(30)
            return plain_read(fd, buffers, offset)

        object.__setattr__(tier._files._calls, "read", slow_read)
        reader = threading.Thread(target=assert_reads, args=(tier, a))
        reader.start()
        assert is_reading.wait(30)
        assert put(tier, b) == PutResult(PutOutcome.BUSY, ())
        may_go_on.set()
        reader.join(30)
        assert put(tier, b).outcome is PutOutcome.STORED
        tier.check_integrity()


def test_many_threads_never_read_a_wrong_byte(tmp_path):
    blocks = [named_hash(f"b{i}") for i in range(60)]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        order = np.random.default_rng(number).permutation(np.tile(np.arange(60), 4))
        buffer = np.empty(BLOCK_BYTES, np.uint8)
        try:
            for index in order:
                block_hash = blocks[index]
                if isinstance(tier.get(block_hash, buffer), StoredBlock):
                    assert buffer.tobytes() == payload(block_hash).tobytes()
                else:
                    put(tier, block_hash)
        except BaseException as error:
            failures.append(error)

    with closing(open_tier(tmp_path, HEAD_BYTES + 32 * (RECORD_BYTES + BLOCK_BYTES))) as tier:  # fewer than there are
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        assert tier.stats.num_corrupt == 0
        assert tier.stats.num_read > 0
        tier.check_integrity()


def test_after_closing_every_operation_says_so(tmp_path):
    tier = open_tier(tmp_path)
    put(tier, named_hash("a"))
    tier.close()
    tier.close()
    for operation in (
        lambda: put(tier, named_hash("b")),
        lambda: tier.get(named_hash("a"), bytearray(BLOCK_BYTES)),
        tier.sync,
    ):
        with pytest.raises(DiskTierClosed, match="is closed"):
            operation()


def test_malformed_blocks_and_impossible_bounds_are_refused(tmp_path):
    with closing(open_tier(tmp_path)) as tier:
        with pytest.raises(ValueError, match="8 bytes"):
            tier.put(named_hash("a"), None, 0, 0, bytes(8))
        with pytest.raises(ValueError, match="proof -1"):
            tier.put(named_hash("a"), None, -1, 0, bytes(BLOCK_BYTES))
        with pytest.raises(ValueError, match="into 8 bytes"):
            tier.get(named_hash("a"), bytearray(8))
    with pytest.raises(ValueError, match="has no room for one block of 256 bytes"):
        open_tier(tmp_path / "tiny", 4096)
    assert not (tmp_path / "tiny").exists()
