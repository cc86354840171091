"""Lets another process of this machine use a tensor's memory: a rank's cache, in the worker's process, without a copy.

    the owner                           who maps it
    share(tensor) -> SharedTensor  -->  map_shared(shared) -> Tensor

The owner has to live until the other has mapped it. Main memory comes from /dev/shm, under no name: it is gone with the
last process that has it, however that ends.
"""

from __future__ import annotations

import mmap
import os
import shutil
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

_SHARED_MEMORY: Final = "/dev/shm"


@dataclass(frozen=True)
class SharedTensor:
    """A tensor of bytes in memory that two processes have; can be pickled."""

    place: str | tuple[Any, ...]
    """The path of the owner's descriptor; on a GPU, what torch's own handles consist of."""
    num_bytes: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def share(tensor: Tensor) -> SharedTensor:
    """Return what another process maps it by. `tensor` is uint8, a view of its storage.

    In main memory the storage moves to shared pages, once, under all tensors that have it: their addresses are others
    then. Raises MemoryError where there is no room for it.
    """
    assert tensor.dtype == torch.uint8
    storage = tensor.untyped_storage()
    where = (storage.nbytes(), tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
    if tensor.device.type != "cpu":
        handles: tuple[Any, ...] = storage._share_cuda_()  # type: ignore[no-untyped-call]
        return SharedTensor(handles, *where)
    room = shutil.disk_usage(_SHARED_MEMORY).free
    if not storage.is_shared() and storage.nbytes() > room:
        raise MemoryError(
            f"{_SHARED_MEMORY} has room for {room} bytes, and the KV cache of a rank has {storage.nbytes()}"
        )
    descriptor, _ = storage._share_fd_cpu_()
    return SharedTensor(f"/proc/{os.getpid()}/fd/{descriptor}", *where)


def map_shared(shared: SharedTensor) -> Tensor:
    """Return the same bytes. Raises OSError where the owner is gone."""
    if isinstance(shared.place, str):
        with open(shared.place, "r+b") as file:
            raw = torch.frombuffer(mmap.mmap(file.fileno(), shared.num_bytes), dtype=torch.uint8)
    else:
        storage = torch.UntypedStorage._new_shared_cuda(*shared.place)
        raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
    return raw.as_strided(shared.size, shared.stride, shared.offset)
