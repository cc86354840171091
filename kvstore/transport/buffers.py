"""Shows neighbouring blocks of a pool as one buffer to send from or receive into. No copy."""

from __future__ import annotations

import ctypes

import numpy as np

from kvstore.block import BlockMemory
from kvstore.errors import TransportError


class CudaRegion:
    """Device memory as `__cuda_array_interface__`, which ucxx understands."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


def region(memory: BlockMemory, first_block: int, num_blocks: int) -> object:
    """Return blocks `first_block ...` of a pool as one buffer. Raises `TransportError` where they are not all in it."""
    if num_blocks < 1 or first_block < 0 or first_block + num_blocks > memory.num_blocks:
        raise TransportError(
            f"blocks {first_block} to {first_block + num_blocks} are not in this pool of {memory.num_blocks}"
        )
    address = memory.address + first_block * memory.block_bytes
    size_bytes = num_blocks * memory.block_bytes
    if memory.device == "cpu":
        return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))
    return CudaRegion(address, size_bytes)
