"""Reads and writes the disk tier's two files: slots of fixed size for bytes, and a table of their content.

    tandem.blocks   | payload 0 | payload 1 | ...
    tandem.table    | head, to 4096 | record 0 | record 1 | ...

The table is a file of its own so that a start reads one small run, and so that both grow and shrink at their ends. Each
record is checksummed together with its slot, and carries the block's proof and checksum. A slot is rewritten in the
order erase record, write payload, write record, without fsync: a killed process leaves an erased record; a lost power
supply may leave any mixture, which both checksums tell from a block. Data can be lost, never wrong.

No lock here: `kvstore.store.disk_tier` sees to it that a slot has one writer, or readers.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.block import HASH_BYTES, BlockHash, Checksum, Proof

logger = logging.getLogger(__name__)

FORMAT_VERSION: Final = 3
BLOCKS_NAME: Final = "tandem.blocks"
TABLE_NAME: Final = "tandem.table"
HEAD_BYTES: Final = 4096
_CHECKSUM_BYTES: Final = 8
_MAX_GROWTH_BYTES: Final = 64 * 1024 * 1024
_MIN_NUM_GROWTHS: Final = 16  # so that a small store grows in small steps

_MAGIC: Final = b"TANDEMKV"
_HEAD: Final = struct.Struct("<8sHHIQ32s")  # magic, version, 0, 0, block bytes, fingerprint
_HAS_PARENT: Final = 1
_RECORD: Final = struct.Struct("<HHIQQQ16s16s")  # version, flags, 0, sequence, proof, checksum, hash, parent
RECORD_BYTES: Final = _RECORD.size + _CHECKSUM_BYTES
_ERASED: Final = bytes(RECORD_BYTES)
_OPEN: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # what a link points to is not ours to write


@dataclass(frozen=True)
class FileCalls:
    """The system calls that can fail for want of space or of a good disk; tests put failing ones here."""

    write: Callable[[int, Sequence[memoryview], int], int] = os.pwritev
    read: Callable[[int, Sequence[memoryview], int], int] = os.preadv
    allocate: Callable[[int, int, int], None] = os.posix_fallocate
    sync: Callable[[int], None] = os.fdatasync


class Record(NamedTuple):
    """The table's record of a slot. `sequence` counts the writes of a store: higher is newer."""

    sequence: int
    proof: Proof
    checksum: Checksum  # of the payload
    block_hash: BlockHash
    parent_hash: BlockHash | None


@dataclass
class RecoveryReport:
    """Counts of one start."""

    num_blocks: int = 0  # found whole; payloads are verified when they are read
    num_bad_records: int = 0  # torn, flipped, or of a payload that was cut off
    num_duplicates: int = 0  # older copies of a block
    num_surplus_blocks: int = 0  # good, and more than the bound allows
    num_unusable_files: int = 0  # damaged, a link, or of another version or layout: emptied or removed
    num_foreign_files: int = 0  # not ours by their names: left alone


class DiskFiles:
    """Both files, open. All calls block; OSError comes out as it is."""

    def __init__(self, directory: Path, block_bytes: int, fingerprint: str, max_bytes: int, calls: FileCalls) -> None:
        """Open the files, made if absent, which take `max_bytes` together at most. Raises OSError."""
        self.block_bytes = block_bytes
        self.num_slots = 0
        self._max_slots = max_num_slots(max_bytes, block_bytes)
        self._max_growth = max(1, min(_MAX_GROWTH_BYTES, max_bytes // _MIN_NUM_GROWTHS) // block_bytes)
        self._fingerprint = fingerprint
        self._calls = calls
        self._num_links = 0
        self._blocks = self._open(directory / BLOCKS_NAME)
        try:
            self._table = self._open(directory / TABLE_NAME)
        except BaseException:
            os.close(self._blocks)
            raise

    @property
    def size_bytes(self) -> int:
        """Bytes of disk that the files take."""
        return HEAD_BYTES + self.num_slots * (self.block_bytes + RECORD_BYTES) if self.num_slots else 0

    @property
    def can_grow(self) -> bool:
        """Whether the bound leaves room for more slots."""
        return self.num_slots < self._max_slots

    def recover(self) -> tuple[dict[int, Record], RecoveryReport]:
        """Read the table, and cut the files to the bound and to each other; the good records by slot. Raises OSError.

        What is no table of ours, or has another version or layout (another proof key's, too), is emptied, and the
        blocks with it.
        """
        records: dict[int, Record] = {}
        report = RecoveryReport(num_unusable_files=self._num_links)
        table_bytes = os.fstat(self._table).st_size
        try:
            head = self._read_run(self._table, HEAD_BYTES, 0)
            table = self._read_run(self._table, max(0, table_bytes - HEAD_BYTES), HEAD_BYTES)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            head, table = b"the disk has lost it", b""
        num_slots = os.fstat(self._blocks).st_size // self.block_bytes
        if head[: len(self._head())] != self._head():
            if table_bytes or num_slots:
                logger.warning(
                    "the table is damaged, or of another version, layout or proof key: all blocks are dropped"
                )
                report.num_unusable_files += 1
            num_slots, table = 0, b""
        self.num_slots = min(num_slots, self._max_slots)
        for slot in range(-(-len(table) // RECORD_BYTES)):
            encoded = table[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES].ljust(RECORD_BYTES, b"\0")
            record = None if encoded == _ERASED else _decode_record(encoded, slot)
            if record is not None and slot < self.num_slots:
                records[slot] = record
            elif record is not None and slot < num_slots:
                report.num_surplus_blocks += 1
            elif encoded != _ERASED:
                report.num_bad_records += 1
                if slot < self.num_slots:
                    self.try_to_erase(slot)
        self._cut()
        return records, report

    def grow(self) -> int:
        """Add slots, allocate all their space, return how many. A full disk raises OSError here and leaves nothing."""
        calls, old = self._calls, self.num_slots
        num_slots = min(self._max_growth, self._max_slots - old)
        try:
            calls.allocate(self._blocks, old * self.block_bytes, num_slots * self.block_bytes)
            calls.allocate(self._table, HEAD_BYTES + old * RECORD_BYTES, num_slots * RECORD_BYTES)
            if not old:
                self._write_all(self._table, memoryview(self._head()), 0)
        except BaseException:
            self._cut()
            raise
        self.num_slots += num_slots
        return num_slots

    def write(self, slot: int, record: Record, payload: memoryview) -> None:
        """Replace a slot's content by a record and its `block_bytes` bytes.

        Where it fails, the slot holds no record, or one that a read finds wrong.
        """
        self.erase(slot)
        self._write_all(self._blocks, payload, slot * self.block_bytes)
        self._write_all(self._table, memoryview(_encode_record(record, slot)), HEAD_BYTES + slot * RECORD_BYTES)

    def erase(self, slot: int) -> None:
        """Make a slot hold no record."""
        self._write_all(self._table, memoryview(_ERASED), HEAD_BYTES + slot * RECORD_BYTES)

    def try_to_erase(self, slot: int) -> None:
        """Erase if the disk lets us: for records that may be found again without harm."""
        try:
            self.erase(slot)
        except OSError as error:
            logger.warning("slot %d cannot be erased: %s", slot, error)

    def read(self, slot: int, into: memoryview) -> bool:
        """Fill `into` with a slot's payload; False if the file ends before. Whether it is right, the checksum says."""
        return self._read_into(self._blocks, into, slot * self.block_bytes) == len(into)

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        self._calls.sync(self._blocks)
        self._calls.sync(self._table)

    def close(self) -> None:
        """Close the files; no other call may be under way."""
        os.close(self._blocks)
        os.close(self._table)

    def _open(self, path: Path) -> int:
        try:
            return os.open(path, _OPEN, 0o600)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        logger.warning("%s is a link, and is removed", path)
        self._num_links += 1
        path.unlink()
        return os.open(path, _OPEN, 0o600)

    def _cut(self) -> None:
        """Make both files as long as the slots are. What the table lacks at its end reads as erased."""
        os.ftruncate(self._blocks, self.num_slots * self.block_bytes)
        os.ftruncate(self._table, HEAD_BYTES + self.num_slots * RECORD_BYTES if self.num_slots else 0)

    def _head(self) -> bytes:
        body = _HEAD.pack(_MAGIC, FORMAT_VERSION, 0, 0, self.block_bytes, self._fingerprint.encode())
        return body + _checksum(body)

    def _write_all(self, fd: int, rest: memoryview, offset: int) -> None:
        while rest:
            num_written = self._calls.write(fd, [rest], offset)
            if num_written == 0:
                raise OSError(errno.EIO, f"nothing of {len(rest)} bytes is written")
            rest, offset = rest[num_written:], offset + num_written

    def _read_into(self, fd: int, into: memoryview, offset: int) -> int:
        """Fill `into`; returns how many bytes there were: fewer where the file ends."""
        num_read = 0
        while num_read < len(into):
            count = self._calls.read(fd, [into[num_read:]], offset + num_read)
            if count == 0:
                break
            num_read += count
        return num_read

    def _read_run(self, fd: int, num_bytes: int, offset: int) -> bytes:
        run = bytearray(num_bytes)
        return bytes(run[: self._read_into(fd, memoryview(run), offset)])


def max_num_slots(max_bytes: int, block_bytes: int) -> int:
    """Return how many slots fit. Raises ValueError where that is none."""
    num_slots = (max_bytes - HEAD_BYTES) // (block_bytes + RECORD_BYTES)
    if num_slots < 1:
        raise ValueError(f"a disk tier of {max_bytes} bytes has no room for one block of {block_bytes} bytes")
    return num_slots


def _checksum(body: bytes, place: bytes = b"") -> bytes:
    return hashlib.blake2b(body + place, digest_size=_CHECKSUM_BYTES, person=b"tandem.disk").digest()


def _encode_record(record: Record, slot: int) -> bytes:
    flags = 0 if record.parent_hash is None else _HAS_PARENT
    parent = bytes(HASH_BYTES) if record.parent_hash is None else record.parent_hash
    numbers = (FORMAT_VERSION, flags, 0, record.sequence, record.proof, record.checksum)
    body = _RECORD.pack(*numbers, record.block_hash, parent)
    return body + _checksum(body, slot.to_bytes(8, "little"))


def _decode_record(encoded: bytes, slot: int) -> Record | None:
    body, checksum = encoded[: _RECORD.size], encoded[_RECORD.size :]
    if checksum != _checksum(body, slot.to_bytes(8, "little")):
        return None
    version, flags, _, sequence, proof, checksum, block_hash, parent = _RECORD.unpack(body)
    if version != FORMAT_VERSION:
        return None
    parent_hash = BlockHash(parent) if flags & _HAS_PARENT else None
    return Record(sequence, Proof(proof), Checksum(checksum), BlockHash(block_hash), parent_hash)
