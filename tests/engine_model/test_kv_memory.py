"""The cache as memory for transports: the same bytes, aligned, with the sums that peers compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore.block import ROW_WORDS, HostMemory, Multipliers
from kvstore.errors import IncompatibleLayout
from services.engine.config import EngineConfig
from services.engine.native import Engine
from services.engine.native.memory.kv_memory import allocate_kv_cache, as_bytes, block_memory
from services.engine.tensor_memory import DeviceMemory, tensor_memory
from tests.hf_models import write_model

SHAPE = (40, 3, 2, 2, 16, 8)
KEY, OTHER_KEY = Multipliers.of(b"a key"), Multipliers.of(b"another key")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_cache_is_zeroed_aligned_and_shared_with_its_memory(dtype: torch.dtype) -> None:
    kv_cache = allocate_kv_cache(SHAPE, dtype, torch.device("cpu"))
    memory = block_memory(kv_cache)
    assert isinstance(memory, HostMemory)
    assert kv_cache.shape == SHAPE
    assert kv_cache.is_contiguous()
    assert kv_cache.count_nonzero() == 0
    assert kv_cache.data_ptr() % 4096 == 0
    assert (memory.num_blocks, memory.block_bytes) == (40, kv_cache[0].nbytes)
    assert memory.geometry.regions[0].address == kv_cache.data_ptr()
    kv_cache[7] = 1.5
    assert bytes(memory.view(7)) == kv_cache[7].contiguous().view(torch.uint8).numpy().tobytes()
    memory.view(8)[:] = memory.view(7)
    assert bool((kv_cache[8] == 1.5).all())


@pytest.mark.parametrize("num_words", [96, ROW_WORDS, 2 * ROW_WORDS + 24], ids=["part of a row", "a row", "more"])
def test_a_device_sums_to_the_same_bytes_as_a_cpu(num_words: int) -> None:
    kv_cache = torch.randn((40, 4 * num_words), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ids = [39, 0, 7, 7, *range(30)]
    blocks = as_bytes(kv_cache)
    on_device, on_cpu = DeviceMemory(blocks[None]), HostMemory(blocks.numpy())
    for multipliers in (KEY, OTHER_KEY):
        assert on_device.sums(ids, multipliers) == on_cpu.sums(ids, multipliers)
    assert on_device.sums(ids, KEY) != on_device.sums(ids, OTHER_KEY)
    assert on_device.sums([], KEY) == []


def test_device_memory_addresses_blocks() -> None:
    kv_cache = torch.zeros(SHAPE)
    memory = DeviceMemory(as_bytes(kv_cache)[None])
    assert (memory.num_blocks, memory.block_bytes, memory.device) == (40, kv_cache[0].nbytes, "cpu")
    assert memory.geometry.regions[0].address == kv_cache.data_ptr()
    assert memory.view(3).data_ptr() == kv_cache[3].data_ptr()
    memory.view(3).fill_(0xFF)
    assert bool(kv_cache[3].isnan().all())
    assert int(kv_cache.isnan().sum()) == kv_cache[3].numel()


def in_pieces(num_pieces: int, num_blocks: int, piece_bytes: int) -> torch.Tensor:
    """A cache as engines keep it that have one storage for all layers, layer by layer, behind something else."""
    storage = torch.randint(0, 256, (4096 + num_pieces * num_blocks * piece_bytes,), dtype=torch.uint8)
    return storage[4096:].view(num_pieces, num_blocks, piece_bytes)


@pytest.mark.parametrize("num_pieces", [1, 3, 24])
@pytest.mark.parametrize("piece_bytes", [8, 2304, 8 * ROW_WORDS, 5 * 8 * ROW_WORDS + 64])
def test_a_block_in_pieces_has_the_sums_of_its_bytes_in_one_on_both_kinds_of_memory(
    num_pieces: int, piece_bytes: int
) -> None:
    pieces = in_pieces(num_pieces, 20, piece_bytes)
    whole = HostMemory(pieces.transpose(0, 1).reshape(20, -1).numpy())
    ids = [19, 0, 7, 7, *range(18)]
    for memory in (tensor_memory(pieces), DeviceMemory(pieces)):
        assert memory.sums(ids, KEY) == whole.sums(ids, KEY)
        assert (memory.num_blocks, memory.block_bytes) == (20, whole.block_bytes)
        assert memory.geometry.span_bytes == pieces.nbytes
        staging = memory.staging(3)
        memory.gather(5, staging)
        assert bytes(staging.numpy() if isinstance(staging, torch.Tensor) else staging) == whole.array[5:8].tobytes()
        memory.scatter(0, staging)
        whole.array[:3] = whole.array[5:8]
        assert memory.sums(ids, KEY) == whole.sums(ids, KEY)


def test_the_caches_of_ranks_are_one_pool_on_both_kinds_of_memory() -> None:
    ranks = [in_pieces(6, 20, 2304) for _ in range(4)]
    whole = HostMemory(torch.stack(ranks, dim=1).reshape(24, 20, 2304).transpose(0, 1).reshape(20, -1).numpy())
    for memory in (tensor_memory(*ranks), DeviceMemory(*ranks)):
        assert [region.address for region in memory.geometry.regions] == [rank.data_ptr() for rank in ranks]
        assert memory.sums([19, 0, 7, 7], KEY) == whole.sums([19, 0, 7, 7], KEY)
        staging = memory.staging(3)
        memory.gather(5, staging)
        assert bytes(staging.numpy() if isinstance(staging, torch.Tensor) else staging) == whole.array[5:8].tobytes()
        memory.scatter(0, staging)
        whole.array[:3] = whole.array[5:8]
        assert memory.sums(range(20), KEY) == whole.sums(range(20), KEY)
    with pytest.raises(ValueError, match="alike"):
        DeviceMemory(ranks[0], ranks[1][:5])


@pytest.mark.parametrize("block_id", [-1, 40])
def test_blocks_outside_the_pool_are_refused(block_id: int) -> None:
    memory = DeviceMemory(as_bytes(torch.zeros(SHAPE))[None])
    with pytest.raises(IndexError, match="40"):
        memory.view(block_id)
    with pytest.raises(IndexError, match="40"):
        memory.sums([0, block_id], KEY)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_pieces", [1, 3, 24])
def test_a_cuda_device_sums_and_copies_blocks_as_a_cpu_does(num_pieces: int) -> None:
    pieces = in_pieces(num_pieces, 40, 9000)
    on_cpu, on_device = tensor_memory(pieces), tensor_memory(pieces.cuda())
    assert on_device.sums(range(40), KEY) == on_cpu.sums(range(40), KEY)
    staging = on_device.staging(5)
    on_device.gather(30, staging)
    on_device.scatter(2, staging)
    assert on_device.sums(range(2, 7), KEY) == on_cpu.sums(range(30, 35), KEY)
    assert on_device.sums(range(7, 40), KEY) == on_cpu.sums(range(7, 40), KEY)


def test_the_same_memory_holds_more_blocks_in_8_bits(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "model", "mistral", dtype="bfloat16"))  # heads of 32 numbers
    config = EngineConfig(model, kv_cache_memory_bytes=8 << 20, max_num_seqs=4, max_model_len=256, num_threads=1)
    plain, in_8_bits = (Engine.from_config(replace(config, kv_cache_dtype=dtype)) for dtype in ("auto", "int8"))
    assert plain.capabilities.num_blocks == (8 << 20) // (3 * 2 * 2 * 32 * 32 * 2)
    assert in_8_bits.capabilities.num_blocks == (8 << 20) // (3 * 2 * 2 * 32 * (32 + 4))
    assert in_8_bits.memory.block_bytes == in_8_bits.layout.block_bytes
    kept = [engine.capabilities.kv_cache_dtype for engine in (plain, in_8_bits)]
    assert kept == ["bfloat16", "int8"]
    with pytest.raises(
        IncompatibleLayout, match=r"dtype: ours bfloat16, theirs uint8; .*scales: ours \(none\), theirs int8"
    ):
        plain.layout.check_compatible(in_8_bits.layout, "a peer")
