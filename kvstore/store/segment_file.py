"""One file of the disk tier: a table of record headers, and a slot of fixed size for each block's bytes.

    0        4096                          payload_offset                                    size
    | head   | header 0 | header 1 | ...   | payload 0 | payload 1 | ...                     |

A header stands far from its payload so that a start reads one small run per file. Each header is checksummed together
with its place, and carries the payload's proof. A slot is rewritten in the order erase header, write payload, write
header, without fsync: a killed process leaves an erased header; a lost power supply may leave any mixture, which the
checksum and the proof tell from a record. Data can be lost, never wrong.

No lock here: `kvstore.store.disk_tier` sees to it that a slot has one writer, or readers.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from kvstore.block import HASH_BYTES, BlockHash, Proof
from kvstore.errors import KVStoreError

logger = logging.getLogger(__name__)

FORMAT_VERSION: Final = 1
_PAGE_BYTES: Final = 4096
_CHECKSUM_BYTES: Final = 8

_MIN_SEGMENT_BYTES: Final = 64 * 1024 * 1024
_MAX_NUM_SEGMENTS: Final = 256  # each is an open file; many processes may open no more than 1,024
_MIN_NUM_SEGMENTS: Final = 16  # so that a small store grows and shrinks in small steps

_FILE_MAGIC: Final = b"TANDEMKV"
_FILE_HEAD: Final = struct.Struct("<8sHHIQQ32s")  # magic, version, 0, num_slots, segment id, block bytes, fingerprint

_RECORD_MAGIC: Final = b"TKVR"
_HAS_PARENT: Final = 1
_RECORD: Final = struct.Struct("<4sHHQQQ16s16s")  # magic, version, flags, length, sequence, proof, hash, parent
HEADER_BYTES: Final = _RECORD.size + _CHECKSUM_BYTES
_ERASED: Final = bytes(HEADER_BYTES)
_NO_PARENT: Final = bytes(HASH_BYTES)


class UnusableSegment(KVStoreError):
    """A file is no segment of this store: foreign, damaged, or of another version or layout."""


@dataclass(frozen=True)
class FileCalls:
    """The system calls that can fail for want of space or of a good disk; tests put failing ones here."""

    write: Callable[[int, Sequence[memoryview], int], int] = os.pwritev
    read: Callable[[int, Sequence[memoryview], int], int] = os.preadv
    allocate: Callable[[int, int, int], None] = os.posix_fallocate
    sync: Callable[[int], None] = os.fdatasync


class Record(NamedTuple):
    """What a header says. `sequence` counts the writes of a store: higher is newer."""

    sequence: int
    proof: Proof
    block_hash: BlockHash
    parent_hash: BlockHash | None


@dataclass(frozen=True)
class SegmentShape:
    """Where things are in a segment of `num_slots` blocks of `block_bytes`."""

    num_slots: int
    block_bytes: int

    @classmethod
    def of_size(cls, block_bytes: int, size_bytes: int) -> SegmentShape:
        """Return the largest shape of at most `size_bytes`, or else that of one block."""
        return cls(max(1, (size_bytes - 2 * _PAGE_BYTES) // (block_bytes + HEADER_BYTES)), block_bytes)

    @classmethod
    def filling(cls, block_bytes: int, max_bytes: int) -> SegmentShape:
        """Return the shape of which 16 to 256 fill `max_bytes`. Raises ValueError if not even one block fits."""
        target_bytes = min(max(_MIN_SEGMENT_BYTES, max_bytes // _MAX_NUM_SEGMENTS), max_bytes // _MIN_NUM_SEGMENTS)
        shape = cls.of_size(block_bytes, target_bytes)
        if shape.size_bytes > max_bytes:
            raise ValueError(f"a disk tier of {max_bytes} bytes has no room for one block of {block_bytes} bytes")
        return shape

    @property
    def payload_offset(self) -> int:
        """Where payload 0 starts; on a page boundary."""
        return _PAGE_BYTES - (-self.num_slots * HEADER_BYTES // _PAGE_BYTES) * _PAGE_BYTES

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.payload_offset + self.num_slots * self.block_bytes

    def payload_end(self, slot: int) -> int:
        """Where a slot's payload ends."""
        return self.payload_offset + (slot + 1) * self.block_bytes


class SegmentFile:
    """An open segment. All calls block; OSError comes out as it is."""

    def __init__(self, path: Path, fd: int, segment_id: int, shape: SegmentShape, calls: FileCalls) -> None:
        self.path = path
        self.segment_id = segment_id
        self.shape = shape
        self._fd = fd
        self._calls = calls

    @classmethod
    def create(
        cls, path: Path, segment_id: int, shape: SegmentShape, fingerprint: str, calls: FileCalls
    ) -> SegmentFile:
        """Make a new file with all its space allocated, so that a full disk shows here. Leaves nothing on failure."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            calls.allocate(fd, 0, shape.size_bytes)
            segment = cls(path, fd, segment_id, shape, calls)
            segment._write_all(memoryview(_encode_head(segment_id, shape, fingerprint)), 0)
        except BaseException:
            os.close(fd)
            path.unlink()
            raise
        return segment

    @classmethod
    def open(
        cls, path: Path, segment_id: int, block_bytes: int, fingerprint: str, calls: FileCalls
    ) -> tuple[SegmentFile, dict[int, Record], int]:
        """Return the segment, its good records by slot, and the number of bad ones, which are erased.

        A truncated file is extended again; the records whose payload was cut count as bad. Raises `UnusableSegment`.
        """
        # O_NOFOLLOW: what a link in the directory points to is not ours to write.
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            shape = _decode_head(_read_run(fd, _PAGE_BYTES, 0, calls), segment_id, block_bytes, fingerprint)
            segment = cls(path, fd, segment_id, shape, calls)
            records, num_bad = segment._read_table()
        except BaseException:
            os.close(fd)
            raise
        return segment, records, num_bad

    def write(self, slot: int, record: Record, payload: memoryview) -> None:
        """Replace a slot's content by a record and its `block_bytes` bytes.

        Where it fails, the slot holds no record, or one that a read finds wrong.
        """
        self.erase(slot)
        self._write_all(payload, self.shape.payload_end(slot) - self.shape.block_bytes)
        header = _encode_record(record, self.segment_id, slot, self.shape.block_bytes)
        self._write_all(memoryview(header), _header_offset(slot))

    def erase(self, slot: int) -> None:
        """Make a slot hold no record."""
        self._write_all(memoryview(_ERASED), _header_offset(slot))

    def try_to_erase(self, slot: int) -> None:
        """The same, if the disk lets us: for records of which it does no harm to find them again."""
        try:
            self.erase(slot)
        except OSError as error:
            logger.warning("%s: slot %d cannot be erased: %s", self.path, slot, error)

    def read(self, slot: int, into: memoryview) -> bool:
        """Fill `into` with a slot's payload; False if the file ends before. Whether it is right, the proof says."""
        offset = self.shape.payload_end(slot) - self.shape.block_bytes
        num_read = 0
        while num_read < len(into):
            count = self._calls.read(self._fd, [into[num_read:]], offset + num_read)
            if count == 0:
                return False
            num_read += count
        return True

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        self._calls.sync(self._fd)

    def close(self) -> None:
        """Close the file; no other call may be under way."""
        os.close(self._fd)

    def remove(self) -> None:
        """Close and delete the file."""
        self.close()
        self.path.unlink()

    def _read_table(self) -> tuple[dict[int, Record], int]:
        size_bytes = os.fstat(self._fd).st_size
        table = _read_run(self._fd, self.shape.num_slots * HEADER_BYTES, _PAGE_BYTES, self._calls)
        records: dict[int, Record] = {}
        num_bad = 0
        for slot in range(self.shape.num_slots):
            header = table[slot * HEADER_BYTES : (slot + 1) * HEADER_BYTES].ljust(HEADER_BYTES, b"\0")
            if header == _ERASED:
                continue
            record = _decode_record(header, self.segment_id, slot, self.shape.block_bytes)
            if record is not None and self.shape.payload_end(slot) <= size_bytes:
                records[slot] = record
            else:
                num_bad += 1
                self.try_to_erase(slot)
        if size_bytes != self.shape.size_bytes:
            os.ftruncate(self._fd, self.shape.size_bytes)
        return records, num_bad

    def _write_all(self, rest: memoryview, offset: int) -> None:
        while rest:
            num_written = self._calls.write(self._fd, [rest], offset)
            rest, offset = rest[num_written:], offset + num_written


def _read_run(fd: int, num_bytes: int, offset: int, calls: FileCalls) -> bytes:
    """Return up to `num_bytes`; fewer where the file ends."""
    run = bytearray(num_bytes)
    num_read = 0
    while num_read < num_bytes:
        count = calls.read(fd, [memoryview(run)[num_read:]], offset + num_read)
        if count == 0:
            break
        num_read += count
    return bytes(run[:num_read])


def _header_offset(slot: int) -> int:
    return _PAGE_BYTES + slot * HEADER_BYTES


def _checksum(body: bytes, place: bytes = b"") -> bytes:
    return hashlib.blake2b(body + place, digest_size=_CHECKSUM_BYTES, person=b"tandem.disk").digest()


def _encode_head(segment_id: int, shape: SegmentShape, fingerprint: str) -> bytes:
    body = _FILE_HEAD.pack(
        _FILE_MAGIC, FORMAT_VERSION, 0, shape.num_slots, segment_id, shape.block_bytes, fingerprint.encode()
    )
    return body + _checksum(body)


def _decode_head(head: bytes, segment_id: int, block_bytes: int, fingerprint: str) -> SegmentShape:
    if not head.startswith(_FILE_MAGIC):
        raise UnusableSegment("it is not a segment file")
    body = head[: _FILE_HEAD.size]
    if len(head) < _FILE_HEAD.size + _CHECKSUM_BYTES or head[_FILE_HEAD.size :][:_CHECKSUM_BYTES] != _checksum(body):
        raise UnusableSegment("its head is damaged")
    _, version, _, num_slots, its_id, its_block_bytes, its_fingerprint = _FILE_HEAD.unpack(body)
    if version != FORMAT_VERSION:
        raise UnusableSegment(f"it has format {version}, ours is {FORMAT_VERSION}")
    if its_fingerprint != fingerprint.encode() or its_block_bytes != block_bytes:
        raise UnusableSegment(f"it holds blocks of another layout, {its_fingerprint.decode('ascii', 'replace')}")
    if its_id != segment_id:
        raise UnusableSegment(f"it was segment {its_id}")
    return SegmentShape(num_slots, block_bytes)


def _encode_record(record: Record, segment_id: int, slot: int, block_bytes: int) -> bytes:
    flags = 0 if record.parent_hash is None else _HAS_PARENT
    parent = _NO_PARENT if record.parent_hash is None else record.parent_hash
    body = _RECORD.pack(
        _RECORD_MAGIC,
        FORMAT_VERSION,
        flags,
        block_bytes,
        record.sequence,
        record.proof,
        record.block_hash,
        parent,
    )
    return body + _checksum(body, struct.pack("<QI", segment_id, slot))


def _decode_record(header: bytes, segment_id: int, slot: int, block_bytes: int) -> Record | None:
    body, checksum = header[: _RECORD.size], header[_RECORD.size :]
    if checksum != _checksum(body, struct.pack("<QI", segment_id, slot)):
        return None
    magic, version, flags, length, sequence, proof, block_hash, parent = _RECORD.unpack(body)
    if (magic, version, length) != (_RECORD_MAGIC, FORMAT_VERSION, block_bytes):
        return None
    return Record(sequence, Proof(proof), BlockHash(block_hash), BlockHash(parent) if flags & _HAS_PARENT else None)
