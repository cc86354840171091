"""Bytes in the memory of another process of ours, found and changed from outside, as a bad DIMM would (Linux)."""

from __future__ import annotations

from pathlib import Path


def flip_byte(
    pid: int,
    content: bytes,
    offset: int,
    *,
    num_copies: int | None = None,
    min_map_bytes: int = 0,
    is_shared: bool = False,
) -> None:
    """Flip one bit at `offset` in every copy of `content` that the process can write.

    There must be `num_copies` of them, or at least one where that is not said: buffers may have copies of their own.
    Only maps of `min_map_bytes` and more are searched, so that a pool can be told from what is around it. `is_shared`:
    in what torch shares with other processes alone, as ranks' caches are; else in the process's own memory alone.
    """
    num_flipped = 0
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for start, end in _writable_maps(pid, is_shared):
            if end - start < min_map_bytes:
                continue
            memory.seek(start)
            mapped = memory.read(end - start)
            at = mapped.find(content)
            while at >= 0:
                memory.seek(start + at + offset)
                memory.write(bytes([content[offset] ^ 1]))
                num_flipped += 1
                at = mapped.find(content, at + 1)
    is_right = num_flipped > 0 if num_copies is None else num_flipped == num_copies
    assert is_right, f"found {num_flipped} times in process {pid}, expected {num_copies or 'it at least once'}"


def _writable_maps(pid: int, is_shared: bool) -> list[tuple[int, int]]:
    maps = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, permissions, _, _, inode, *name = line.split()
        is_own = inode == "0" and "[v" not in line  # anonymous, and not the kernel's own
        is_wanted = name[:1] and name[0].startswith("/dev/shm/torch_") if is_shared else is_own
        if permissions.startswith("rw") and is_wanted:
            start, end = (int(address, 16) for address in addresses.split("-"))
            maps.append((start, end))
    return maps
