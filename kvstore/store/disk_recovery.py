"""What a disk tier finds when it starts: the good records, and the count of everything that is dropped."""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.block import BlockHash, BlockLayout
from kvstore.store.directory import StoreDirectory
from kvstore.store.segment_file import (
    FileCalls,
    Record,
    SegmentFile,
    UnusableSegment,
)

logger = logging.getLogger(__name__)


@dataclass
class RecoveryReport:
    """Counts of one start."""

    num_blocks: int = 0  # found whole; payloads are verified when they are read
    num_bad_records: int = 0  # torn, flipped, or cut off with the end of their file
    num_duplicates: int = 0  # older copies of a block
    num_unusable_segments: int = 0  # damaged, truncated to nothing, or of another version or layout: removed
    num_surplus_segments: int = 0  # good, and more than the bound allows: removed, oldest first
    num_foreign_files: int = 0  # not ours by their names: left alone


@dataclass
class Recovered:
    """Open segments, by ascending id, and their good records by segment id and slot. The caller closes them."""

    segments: list[SegmentFile] = field(default_factory=list)
    records: dict[int, dict[int, Record]] = field(default_factory=dict)
    report: RecoveryReport = field(default_factory=RecoveryReport)


def recover(directory: StoreDirectory, layout: BlockLayout, max_bytes: int, calls: FileCalls) -> Recovered:
    """Open every segment in `directory`; remove those that are unusable or too many. Raises OSError.

    Blocks. Reads the tables of headers only, in one run per file.
    """
    recovered = Recovered()
    ids, foreign = directory.list_segments()
    recovered.report.num_foreign_files = len(foreign)
    try:
        for segment_id in ids:
            _open_segment(recovered, directory.segment_path(segment_id), segment_id, layout, calls)
        _drop_surplus(recovered, max_bytes)
        _drop_duplicates(recovered)
    except BaseException:
        for segment in recovered.segments:
            segment.close()
        raise
    recovered.report.num_blocks = sum(len(records) for records in recovered.records.values())
    logger.info("disk tier %s: %s", directory.path, recovered.report)
    return recovered


def _open_segment(recovered: Recovered, path: Path, segment_id: int, layout: BlockLayout, calls: FileCalls) -> None:
    try:
        segment, records, num_bad = SegmentFile.open(path, segment_id, layout.block_bytes, layout.fingerprint, calls)
    except (UnusableSegment, OSError) as error:
        # ELOOP: a link, which we do not follow. EIO: the disk has lost it. Others: the store is set up wrongly.
        if isinstance(error, OSError) and error.errno not in (errno.EIO, errno.ELOOP):
            raise
        logger.warning("%s is removed: %s", path, error)
        path.unlink()
        recovered.report.num_unusable_segments += 1
        return
    recovered.segments.append(segment)
    recovered.records[segment_id] = records
    recovered.report.num_bad_records += num_bad


def _drop_surplus(recovered: Recovered, max_bytes: int) -> None:
    """Remove the segments whose newest record is oldest until the rest is within the bound."""
    size_bytes = sum(segment.shape.size_bytes for segment in recovered.segments)
    newest = {
        segment_id: max((record.sequence for record in records.values()), default=0)
        for segment_id, records in recovered.records.items()
    }
    for segment in sorted(recovered.segments, key=lambda segment: newest[segment.segment_id]):
        if size_bytes <= max_bytes:
            return
        size_bytes -= segment.shape.size_bytes
        recovered.segments.remove(segment)
        del recovered.records[segment.segment_id]
        segment.remove()
        recovered.report.num_surplus_segments += 1


def _drop_duplicates(recovered: Recovered) -> None:
    newest: dict[BlockHash, tuple[int, int, int]] = {}
    for segment in recovered.segments:
        for slot, record in list(recovered.records[segment.segment_id].items()):
            here = (record.sequence, segment.segment_id, slot)
            known = newest.setdefault(record.block_hash, here)
            if known == here:
                continue
            newest[record.block_hash] = max(known, here)
            _, segment_id, old_slot = min(known, here)
            del recovered.records[segment_id][old_slot]
            next(s for s in recovered.segments if s.segment_id == segment_id).try_to_erase(old_slot)
            recovered.report.num_duplicates += 1
