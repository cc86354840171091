"""Binds the sampler's C library (csrc/sampler.c): a batch's tokens in one call, but for what it leaves undecided."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import math
import struct
from collections.abc import Sequence
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
from enum import IntEnum
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.native.build import SAMPLER_SOURCES, source_digest
from services.engine.request import SamplingParams

_logger = logging.getLogger(__name__)

_OFF: Final = 2**62  # a top_k above any vocabulary
# Threads are made for a call, which costs some 20 us each: so many logits are worth one more.
_LOGITS_PER_THREAD: Final = 1 << 20


class NotChosen(IntEnum):
    """What stands where a row has no token (csrc/sampler.c)."""

    NO_TOKEN = -1
    UNDECIDED = -2
    NEEDS_MASS = -3


class _Params(Structure):
    """`struct sampling_params` of csrc/sampler.c."""

    _fields_ = (
        ("allowed", c_void_p),
        ("stops", c_void_p),
        ("biased", c_void_p),
        ("biases", c_void_p),
        ("num_allowed", c_int64),
        ("num_stops", c_int64),
        ("num_biased", c_int64),
        ("top_k", c_int64),
        ("num_prompt_tokens", c_int64),
        ("seed", c_uint64),
        ("top_p", c_double),
        ("frequency_penalty", c_double),
        ("presence_penalty", c_double),
        ("temperature", c_float),
        ("log_min_p", c_float),
        ("repetition_penalty", c_float),
        ("is_greedy", c_int32),
        ("ignores_eos", c_int32),
        ("reserved", c_int32),
    )


class _Call(Structure):
    """`struct sampling_call` of csrc/sampler.c."""

    _fields_ = (
        ("rows", c_char_p),
        ("num_rows", c_int64),
        ("logits", c_void_p),
        ("vocab_size", c_int64),
        ("padded_size", c_int64),
        ("num_candidates", c_int64),
        ("eos", c_void_p),
        ("num_eos", c_int64),
        ("tokens", c_void_p),
        ("workspace", c_void_p),
    )


# `struct sampling_row` before its parameters: index, num_tokens, tokens, log_mass, forbids_ends.
_STEP: Final = struct.Struct("=qqQfi")


def pack_params(sampling: SamplingParams, num_prompt_tokens: int) -> bytes:
    """Return what of a row stays the same from step to step. It points into `sampling`, which must outlive it."""
    return bytes(
        _Params(
            allowed=sampling.allowed_index.ctypes.data,
            stops=sampling.stop_index.ctypes.data,
            biased=sampling.biased_index.ctypes.data,
            biases=sampling.biases.ctypes.data,
            num_allowed=sampling.allowed_index.size,
            num_stops=sampling.stop_index.size,
            num_biased=sampling.biased_index.size,
            top_k=sampling.top_k if sampling.top_k > 0 else _OFF,
            num_prompt_tokens=num_prompt_tokens,
            seed=sampling.seed,
            top_p=sampling.top_p,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            temperature=sampling.temperature,
            log_min_p=math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf,
            repetition_penalty=sampling.repetition_penalty,
            is_greedy=sampling.is_greedy,
            ignores_eos=sampling.ignore_eos,
        )
    )


def pack_row(params: bytes, index: int, num_tokens: int, tokens: int, forbids_ends: bool) -> bytes:
    """Return a row: that of `index` among the logits, of a request of `num_tokens` tokens at address `tokens`, or 0."""
    return _STEP.pack(index, num_tokens, tokens, math.nan, forbids_ends) + params


def with_mass(row: bytes, log_mass: float) -> bytes:
    """Return a packed row with the log(sum(exp)) of its scaled logits."""
    index, num_tokens, tokens, _, forbids_ends = _STEP.unpack_from(row)
    return _STEP.pack(index, num_tokens, tokens, log_mass, forbids_ends) + row[_STEP.size :]


class SamplerLibrary:
    """Calls the library's functions. For one thread's use: it has one workspace."""

    def __init__(self, path: Path) -> None:
        """Load `path`. Raises OSError or AttributeError where it is none of ours, ValueError where it is stale."""
        library = ctypes.CDLL(str(path))
        library.tandem_sampling_digest.restype = c_uint32
        library.tandem_sampling_room.argtypes, library.tandem_sampling_room.restype = (c_int64,), c_int64
        library.tandem_sample.argtypes, library.tandem_sample.restype = (POINTER(_Call), c_int), None
        library.tandem_scaled.argtypes, library.tandem_scaled.restype = (POINTER(_Call), c_int64, c_void_p), None
        if library.tandem_sampling_digest() != source_digest(SAMPLER_SOURCES):
            raise ValueError(f"{path.name} was built from other sources than are here")
        self._library = library
        self._workspace = np.zeros(0, dtype=np.uint8)
        self._padded_size = 0  # that the workspace is laid out for

    def sample(
        self,
        logits: Tensor,
        rows: Sequence[bytes],
        eos_token_ids: npt.NDArray[np.int64],
        padded_size: int,
        num_candidates: int,
        num_threads: int,
    ) -> list[int]:
        """Return each row's token, or one of `NotChosen`. `logits` float32 `[.., vocab_size]`, contiguous."""
        num_threads = min(num_threads, len(rows), 1 + len(rows) * logits.shape[1] // _LOGITS_PER_THREAD)
        tokens = np.empty(len(rows), dtype=np.int64)
        call = self._call(logits, rows, eos_token_ids, padded_size, num_candidates, num_threads)
        call.tokens = tokens.ctypes.data
        self._library.tandem_sample(byref(call), num_threads)
        found: list[int] = tokens.tolist()
        return found

    def scaled(
        self, logits: Tensor, rows: Sequence[bytes], eos_token_ids: npt.NDArray[np.int64], padded_size: int
    ) -> Tensor:
        """Return the rows edited and scaled, `[len(rows), padded_size]`, filled up with -inf."""
        scaled = torch.full((len(rows), padded_size), -math.inf)
        call = self._call(logits, rows, eos_token_ids, padded_size, 0, 1)
        for i in range(len(rows)):
            self._library.tandem_scaled(byref(call), i, scaled[i].data_ptr())
        return scaled

    def _call(
        self,
        logits: Tensor,
        rows: Sequence[bytes],
        eos_token_ids: npt.NDArray[np.int64],
        padded_size: int,
        num_candidates: int,
        num_threads: int,
    ) -> _Call:
        """What the addresses in it point to must outlive it."""
        assert logits.is_contiguous()
        assert logits.dtype == torch.float32
        num_bytes = num_threads * self._library.tandem_sampling_room(padded_size)
        if self._workspace.nbytes < num_bytes or self._padded_size != padded_size:
            self._workspace, self._padded_size = np.zeros(num_bytes, dtype=np.uint8), padded_size
        return _Call(
            rows=b"".join(rows),
            num_rows=len(rows),
            logits=logits.data_ptr(),
            vocab_size=logits.shape[1],
            padded_size=padded_size,
            num_candidates=num_candidates,
            eos=eos_token_ids.ctypes.data,
            num_eos=eos_token_ids.size,
            workspace=self._workspace.ctypes.data,
        )


def library_path() -> Path | None:
    """Where the built library lies; None where it is not built."""
    names = [f"_sampler{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    paths = [Path(__file__).with_name(name) for name in names]
    return next((path for path in paths if path.exists()), None)


@functools.lru_cache(maxsize=1)
def usable_path() -> Path | None:
    """Return the built library's path, None where torch samples; looked for once in a process."""
    path = library_path()
    try:
        if path is not None:
            SamplerLibrary(path)
            return path
        reason = "it is not built (a C compiler was missing when tandem was installed)"
    except (OSError, AttributeError, ValueError) as error:
        reason = str(error)
    _logger.info("torch samples tokens, without the C library: %s", reason)
    return None
