"""Shows neighbouring blocks of a pool as one buffer to send from or receive into. No copy."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

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


def is_one_buffer(memory: BlockMemory) -> bool:
    """Whether neighbouring blocks can be sent from and received into where they are."""
    return memory.geometry.is_contiguous and memory.can_be_shown


def region(memory: BlockMemory, first_block: int, num_blocks: int) -> object:
    """Return blocks `first_block ...` of a pool as one buffer. Raises `TransportError` where they are not all in it.

    Of a pool of which that can be done (`is_one_buffer`) alone.
    """
    check_inside(memory, first_block, num_blocks)
    geometry = memory.geometry
    assert is_one_buffer(memory), "blocks in pieces are no one buffer, nor is what cannot be shown"
    address, size_bytes = (
        geometry.regions[0].address + first_block * geometry.block_stride,
        num_blocks * geometry.block_bytes,
    )
    if memory.device == "cpu":
        return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))
    return CudaRegion(address, size_bytes)


def check_inside(memory: BlockMemory, first_block: int, num_blocks: int) -> None:
    """Raise `TransportError` where blocks `first_block ...` are not all in a pool."""
    if num_blocks < 1 or first_block < 0 or first_block + num_blocks > memory.num_blocks:
        raise TransportError(
            f"blocks {first_block} to {first_block + num_blocks} are not in this pool of {memory.num_blocks}"
        )


def words_of(memory: BlockMemory, first_block: int, num_blocks: int) -> list[npt.NDArray[np.uint64]]:
    """Return neighbouring blocks of a pool in main memory as its own words: by region `(pieces, num_blocks, words)`."""
    check_inside(memory, first_block, num_blocks)
    geometry = memory.geometry
    shape = (geometry.num_pieces // len(geometry.regions), num_blocks, geometry.piece_bytes // 8)
    strides, offset = (geometry.piece_stride, geometry.block_stride, 8), first_block * geometry.block_stride
    spans = [(ctypes.c_uint8 * geometry.span_bytes).from_address(region.address) for region in geometry.regions]
    return [np.ndarray(shape, np.uint64, np.ctypeslib.as_array(span), offset, strides) for span in spans]
