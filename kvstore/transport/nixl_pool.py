"""Describes a pool of blocks to NIXL: our own to the agent, an owner's to a reader."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt


class PoolAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The facts by which a reader reaches every block of an owner's pool."""

    metadata: bytes
    memory_kind: str
    device_id: int
    address: int
    num_blocks: int
    block_bytes: int
    token_address: int
    token: bytes
    """At `token_address`, in main memory: reading it proves that the path works."""


def memory_kind(device: str) -> tuple[str, int]:
    """NIXL's name for a pool's memory, and the device's number."""
    if device == "cpu":
        return "DRAM", 0
    return "VRAM", int(device.partition(":")[2] or 0)


def all_blocks(address: int, device_id: int, num_blocks: int, block_bytes: int) -> npt.NDArray[np.uint64]:
    """One strided descriptor, which NIXL expands: (address, length, device, stride, count)."""
    return np.array([[address, block_bytes, device_id, block_bytes, num_blocks]], np.uint64)
