"""The disk tier's directory: one owner at a time, and the names of its files."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import Final

from kvstore.errors import KVStoreError

_LOCK_NAME: Final = "tandem-store.lock"
_SEGMENT_NAME: Final = re.compile(r"tandem-([0-9]{12})\.blocks")


class DirectoryLocked(KVStoreError):
    """Another process has the directory; the message names both."""


class StoreDirectory:
    """A locked directory. The lock goes with the process, however that ends."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        """Use `open`."""
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def open(cls, path: Path) -> StoreDirectory:
        """Make the directory if it is absent and lock it. Raises `DirectoryLocked`, OSError."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_path = path / _LOCK_NAME
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise DirectoryLocked(
                f"{path} is in use by another store, process {owner}: give each store a directory of its own"
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        return cls(path, fd)

    def segment_path(self, segment_id: int) -> Path:
        """Return where a segment's file is, or goes."""
        return self.path / f"tandem-{segment_id:012d}.blocks"

    def list_segments(self) -> tuple[list[int], list[str]]:
        """Return the ids of the segment files, ascending, and the names of files that are not ours."""
        ids: list[int] = []
        foreign: list[str] = []
        for name in sorted(os.listdir(self.path)):
            match = _SEGMENT_NAME.fullmatch(name)
            if match is not None:
                ids.append(int(match[1]))
            elif name != _LOCK_NAME:
                foreign.append(name)
        return ids, foreign

    def close(self) -> None:
        """Unlock. The lock file stays: removing it could let two owners lock two files of one name."""
        os.close(self._lock_fd)
