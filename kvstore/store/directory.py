"""Owns the disk tier's directory: one process at a time, and the names of its files."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import Final

from kvstore.errors import KVStoreError
from kvstore.store.disk_files import BLOCKS_NAME, TABLE_NAME

_LOCK_NAME: Final = "tandem-store.lock"
_OLD_NAME: Final = re.compile(r"tandem-([0-9]{12})\.blocks")


class DirectoryLocked(KVStoreError):
    """Another process has the directory; the message names both."""


class DirectoryUnusable(KVStoreError):
    """The directory cannot be made, or not be written to."""


class StoreDirectory:
    """A locked directory. The lock goes with the process, however that ends."""

    def __init__(self, path: Path) -> None:
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
                f"{path} is in use by another store, process {owner}; give each store a directory of its own"
            ) from error
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        except OSError:
            os.close(fd)
            raise
        self.path = path
        self._lock_fd = fd

    def tidy(self) -> tuple[int, int]:
        """Remove the files that earlier versions kept blocks in; their number, and that of files that are not ours."""
        names = set(os.listdir(self.path)) - {_LOCK_NAME, BLOCKS_NAME, TABLE_NAME}
        old = {name for name in names if _OLD_NAME.fullmatch(name)}
        for name in old:
            (self.path / name).unlink()
        return len(old), len(names - old)

    def close(self) -> None:
        """Unlock. The lock file stays: removing it could let two owners lock two files of one name."""
        os.close(self._lock_fd)


def check_directory(path: Path) -> None:
    """Make a directory, lock it and let it go, at a start. Raises `DirectoryLocked`, `DirectoryUnusable`."""
    try:
        StoreDirectory(path).close()
    except OSError as error:
        raise DirectoryUnusable(
            f"--store-disk-dir {path}: {error.strerror}; give a directory that this user may write to"
        ) from error
