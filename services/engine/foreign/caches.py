"""Another engine's caches as blocks of ours: viewed without a copy, tried out, put together of its ranks' parts.

A block lies in one piece per layer, or in one where the engine has its layers side by side; which of the two, the
strides of its caches say. What the bytes mean is another matter: kernels may pack them as they like. So `probe` writes
known keys and values through the engine's own path and looks for them in our rows, and what it finds there goes into
the layout, by which peers know each other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from services.engine.model_config import ModelError, UnsupportedModel
from services.engine.shared_tensor import SharedTensor, map_shared

# Of the blocks that the probe writes to: through the engine, by our rows, through the engine again.
_WRITTEN, _COPIED, _AGAIN = 1, 2, 3
NUM_PROBED: Final = 4
_WORDS: Final = {2: torch.int16, 4: torch.int32}  # by element size


@dataclass(frozen=True)
class Kept:
    """What each layer keeps of a block, on one rank."""

    num_layers: int
    num_kv_heads: int
    block_size: int
    num_vectors: int  # per token, layer and head
    head_dim: int
    dtype: torch.dtype
    is_head_major: bool


@dataclass(frozen=True)
class RankCache:
    """What a rank says of its cache; equal on all ranks."""

    packing: str
    """What `probe` returned."""
    isa: str
    scales: str
    attention_backend: str
    is_batch_invariant: bool


def byte_view(caches: Mapping[str, Tensor], num_blocks: int, *, joins_layers: bool) -> Tensor:
    """View an engine's caches as bytes, uint8 `[num_pieces, num_blocks, piece_bytes]`, without copying any.

    `caches`: a tensor for each layer, its blocks along the first axis. `joins_layers`: layers side by side are one
    piece, as they may be where no other rank's come between them. Raises `ModelError` where they are not as we think.
    """
    tensors = sorted(caches.values(), key=Tensor.data_ptr)
    first, storage = tensors[0], tensors[0].untyped_storage()
    piece_bytes, block_stride = first[0].numel() * first.element_size(), first.stride(0) * first.element_size()
    offsets = [tensor.data_ptr() - first.data_ptr() for tensor in tensors]
    layer_stride = offsets[1] if len(tensors) > 1 else piece_bytes
    problem = None
    if any(tensor.untyped_storage().data_ptr() != storage.data_ptr() for tensor in tensors):
        problem = "layers lie in several allocations"
    elif any(tensor.shape != first.shape or tensor.stride() != first.stride() for tensor in tensors):
        problem = "layers differ in shape"
    elif first.shape[0] != num_blocks:
        problem = f"a cache has {first.shape[0]} blocks, the scheduler {num_blocks}"
    elif not _is_dense(first[0]):
        problem = f"a layer's block is not one piece: {tuple(first.shape)} with strides {first.stride()}"
    elif offsets != [index * layer_stride for index in range(len(tensors))]:
        problem = "layers are not evenly spaced"
    if problem is not None:
        raise ModelError(f"the engine's cache is not laid out as we know it: {problem}")
    num_pieces = len(tensors)
    if layer_stride == piece_bytes and joins_layers:
        piece_bytes, num_pieces = num_pieces * piece_bytes, 1
    raw = torch.empty(0, dtype=torch.uint8, device=first.device).set_(storage)  # type: ignore[call-overload]
    begin = first.data_ptr() - storage.data_ptr()
    return raw.as_strided((num_pieces, num_blocks, piece_bytes), (layer_stride, block_stride, 1), begin)


def probe(view: Tensor, kept: Kept, write: Callable[[int, Tensor, Tensor], None]) -> str:
    """Write known keys and values through the engine's own path, and look for them in our rows.

    `write(layer, values, slots)` has the engine put values, `[block_size, num_kv_heads, num_vectors * head_dim]`, to
    the places `slots` of a layer's cache. Returns 16 hex digits that two workers share exactly where their kernels pack
    alike, however many heads each rank has. Raises `ModelError` where a block is not what and where we think it is. To
    be called before anything is cached.
    """
    blocks, layers = view[:, :NUM_PROBED], range(kept.num_layers)
    before = blocks.clone()
    known = [_known(kept, layer, view) for layer in layers]

    def fill(block_id: int) -> None:
        slots = torch.arange(block_id * kept.block_size, (block_id + 1) * kept.block_size, device=view.device)
        for layer in layers:
            write(layer, known[layer], slots)

    fill(_WRITTEN)
    written = blocks[:, _WRITTEN].clone()
    if any(not torch.equal(blocks[:, other], before[:, other]) for other in (0, _COPIED, _AGAIN)):
        raise ModelError("probe: what was written to one block of the engine's cache appeared in another of ours")
    num_parts = len(layers) * (kept.num_kv_heads if kept.is_head_major else 1)
    parts = written.reshape(num_parts, -1)
    if bool((parts == before[:, _WRITTEN].reshape(num_parts, -1)).all(dim=1).any()):
        raise ModelError("probe: what the engine wrote to a block of its cache did not come into ours")
    if kept.dtype.itemsize in _WORDS:
        _find_all(parts, torch.stack([each.transpose(0, 1) for each in known]).reshape(num_parts, -1))
    blocks[:, _COPIED] = written
    fill(_AGAIN)
    if not torch.equal(blocks[:, _AGAIN], blocks[:, _COPIED]):
        raise ModelError("probe: the same keys and values have other bytes in another block of the engine's cache")
    blocks.copy_(before)
    first_heads = parts[:: num_parts // len(layers)].cpu().numpy()
    return hashlib.blake2b(first_heads.tobytes(), digest_size=8, person=b"tandem.probe").hexdigest()


def num_holders(num_ranks: int, num_heads: int, kept: Kept) -> int:
    """Return how many ranks have each of a model's KV heads.

    Raises `UnsupportedModel` where their parts do not make up a block.
    """
    if num_ranks == 1:
        return 1
    if not kept.is_head_major:
        raise UnsupportedModel(
            f"the engine keeps tokens before heads, and so {num_ranks} ranks' parts of a block are no neighbours:"
            " --tensor-parallel-size 1 alone"
        )
    if num_heads % kept.num_kv_heads or num_ranks % (num_heads // kept.num_kv_heads):
        raise UnsupportedModel(f"its {num_heads} KV heads are not divided evenly among {num_ranks} ranks")
    return num_ranks // (num_heads // kept.num_kv_heads)


def gather_ranks(
    answers: Sequence[tuple[Tensor | SharedTensor, RankCache]], mark: Callable[[int], object]
) -> tuple[list[Tensor], RankCache]:
    """Return each rank's view, as this process has it, and what all say of it.

    `mark(block_id)` has each rank write its number, and one, all over a block. Raises `ModelError`, `OSError`.
    """
    marked = NUM_PROBED - 1
    caches = [map_shared(each) if isinstance(each, SharedTensor) else each for each, _ in answers]
    mark(marked)
    for rank, cache in enumerate(caches):
        if not bool((cache[:, marked] == rank + 1).all()):
            raise ModelError(f"what rank {rank} writes to its cache is not seen in the worker's process")
        cache[:, marked] = 0
    said = {each for _, each in answers}
    if len(said) > 1:
        raise ModelError(f"ranks keep their caches in different ways: {said}")
    return caches, said.pop()


def scales_digest(scales: Sequence[tuple[float, float]]) -> str:
    """Return 16 hex digits over each layer's scales of keys and values."""
    return hashlib.blake2b(repr(list(scales)).encode(), digest_size=8).hexdigest()


def _known(kept: Kept, seed: int, like: Tensor) -> Tensor:
    """Keys and values of one layer's block, `[block_size, num_kv_heads, num_vectors * head_dim]`.

    As unlike as numbers can be that each element type holds exactly: seven bits of a fraction, some exponents.
    """
    shape = (kept.num_kv_heads, kept.block_size, kept.num_vectors * kept.head_dim)
    numbers = torch.arange(math.prod(shape), dtype=torch.int64) * 2654435761 + 40503 * seed
    values = (numbers % 128 + 128).to(torch.float32) * torch.exp2((numbers >> 7) % 12 - 12.0)
    dtype = torch.get_default_dtype() if kept.dtype.itemsize < 2 else kept.dtype
    return values.reshape(shape).transpose(0, 1).to(like.device, dtype)


def _find_all(written: Tensor, values: Tensor) -> None:
    """Raise unless each part of a block, a row, has exactly the elements that were written, in whatever order."""
    words = _WORDS[values.element_size()]
    found, expected = (each.contiguous().view(words).sort(dim=1).values for each in (written, values))
    if not torch.equal(found, expected):
        raise ModelError("probe: a block of ours does not hold the keys and values that the engine wrote to it")


def _is_dense(block: Tensor) -> bool:
    strides: Any = block.stride()
    order = sorted(range(block.dim()), key=lambda axis: -strides[axis])
    return block.permute(order).is_contiguous()
