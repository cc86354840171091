"""Reads a checkpoint's weights at memory speed; what its files say of themselves is `services.engine.checkpoint`'s.

Files are mapped, so nothing is read twice or held twice: each tensor goes from the page cache into the memory that the
model computes from, is converted on the way, and is hashed for the fingerprint while it is warm.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.engine.checkpoint import IGNORED_TENSORS, StoredTensor, read_tensors
from services.engine.model_config import UnsupportedModel
from services.engine.native.model.fingerprint import FingerprintBuilder


class Checkpoint:
    """The tensors of a model directory, mapped read-only. Made by `open_checkpoint`."""

    def __init__(self, files: Mapping[Path, safe_open], tensors: Mapping[str, StoredTensor]) -> None:
        self._files = files
        self.tensors = tensors

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that lives in the mapped file: valid while the checkpoint is open, not to be written."""
        tensor: Tensor = self._files[self.tensors[name].file].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[Checkpoint]:
    """Map the checkpoint of `directory`: model.safetensors, or the shards that its index names.

    Raises `ModelNotFound` for missing files, `UnsupportedModel` for unreadable or contradictory ones.
    """
    tensors = read_tensors(directory)
    with ExitStack() as stack:
        files: dict[Path, safe_open] = {}
        for path in sorted({tensor.file for tensor in tensors.values()}):
            _read_ahead(path)
            try:
                files[path] = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except SafetensorError as error:
                raise UnsupportedModel(f"{path} is not a safetensors file ({error}); download it again") from error
        yield Checkpoint(files, tensors)


def _read_ahead(path: Path) -> None:
    """Ask the system to fetch the whole file: page faults alone would read a cold disk in small pieces."""
    if hasattr(os, "posix_fadvise"):  # Linux
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class WeightReader:
    """Reads a checked checkpoint into the model's own memory, and fingerprints what it reads."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        fingerprint: FingerprintBuilder,
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[float], None] | None,
    ) -> None:
        """`dtype` and `device` are those of the tensors that `read` returns; `progress` is called with 0..1."""
        self._checkpoint = checkpoint
        self._fingerprint = fingerprint
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._num_left = sum(not IGNORED_TENSORS.fullmatch(name) for name in checkpoint.tensors)
        self._num_tensors = self._num_left

    def has(self, name: str) -> bool:
        """Return whether the checkpoint has this tensor."""
        return name in self._checkpoint.tensors

    @property
    def num_left(self) -> int:
        """Number of tensors not read yet."""
        return self._num_left

    def read(self, *names: str) -> Tensor:
        """Return the tensors stacked along their first dimension, each of which can be read once."""
        stored = [self._checkpoint.tensors[name] for name in names]
        num_rows = sum(tensor.shape[0] for tensor in stored)
        out = torch.empty((num_rows, *stored[0].shape[1:]), dtype=self._dtype, device=self._device)
        start = 0
        for name, header in zip(names, stored, strict=True):
            mapped = self._checkpoint.tensor(name)
            self._fingerprint.add(name, header.dtype, header.shape, mapped.reshape(-1).view(torch.uint8).numpy())
            out[start : start + header.shape[0]].copy_(mapped)
            start += header.shape[0]
            self._num_left -= 1
            if self._progress is not None:
                self._progress(1 - self._num_left / self._num_tensors)
        return out
