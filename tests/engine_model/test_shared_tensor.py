"""Ranks' caches in another process: the same bytes both ways, one pool of blocks, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest
import torch

from kvstore.block import HostMemory, Multipliers
from services.engine.shared_tensor import SharedTensor, map_shared, share
from services.engine.tensor_memory import tensor_memory

KEY = Multipliers.of(b"a key")

NUM_LAYERS, NUM_BLOCKS, PIECE_BYTES = 3, 6, 512


def rank(number: int, pipe: Connection) -> None:
    """An engine's rank: a cache behind something else, which layers are views of before it is shared."""
    storage = torch.zeros(4096 + NUM_LAYERS * NUM_BLOCKS * PIECE_BYTES, dtype=torch.uint8)
    cache = storage[4096:].view(NUM_LAYERS, NUM_BLOCKS, PIECE_BYTES)
    layers = [cache[layer] for layer in range(NUM_LAYERS)]
    for layer, each in enumerate(layers):
        each.copy_(content(number, layer))
    pipe.send(share(cache))
    for _ in iter(pipe.recv, None):
        pipe.send([int(each[-1, -1]) for each in layers])


def content(number: int, layer: int) -> torch.Tensor:
    drawn = torch.randint(
        0, 256, (NUM_BLOCKS, PIECE_BYTES), generator=torch.Generator().manual_seed(8 * layer + number)
    )
    return drawn.to(torch.uint8)


@contextmanager
def running(num_ranks: int) -> Iterator[list[tuple[Connection, multiprocessing.process.BaseProcess]]]:
    context = multiprocessing.get_context("fork")  # two imports of torch would take longer than all else
    ranks = []
    for number in range(num_ranks):
        here, there = context.Pipe()
        process = context.Process(target=rank, args=(number, there), daemon=True)
        process.start()
        there.close()
        ranks.append((here, process))
    try:
        yield ranks
    finally:
        for here, process in ranks:
            process.kill()
            process.join()
            here.close()


def test_blocks_of_ranks_in_processes_of_their_own_are_the_models_and_outlive_a_killed_rank() -> None:
    before = set(os.listdir("/dev/shm"))
    with running(2) as ranks:
        shown: list[SharedTensor] = [pipe.recv() for pipe, _ in ranks]
        memory = tensor_memory(*map(map_shared, shown))
        layers = [torch.stack([content(number, layer) for number in range(2)], dim=1) for layer in range(NUM_LAYERS)]
        whole = HostMemory(torch.stack(layers, dim=1).reshape(NUM_BLOCKS, -1).numpy())
        assert memory.block_bytes == 2 * NUM_LAYERS * PIECE_BYTES
        assert memory.sums(range(NUM_BLOCKS), KEY) == whole.sums(range(NUM_BLOCKS), KEY)
        staging = memory.staging(1)
        staging[:] = 7  # type: ignore[index]
        memory.scatter(NUM_BLOCKS - 1, staging)
        for pipe, _ in ranks:
            pipe.send("look")
            assert pipe.recv() == [7] * NUM_LAYERS
        ranks[0][1].kill()
        ranks[0][1].join()
        assert memory.sums(range(NUM_BLOCKS - 1), KEY) == whole.sums(range(NUM_BLOCKS - 1), KEY)
        with pytest.raises(FileNotFoundError):
            map_shared(shown[0])
    left = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("torch_")}
    assert not left


def test_a_cache_that_does_not_fit_into_shared_memory_is_refused_rather_than_killed_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil._ntuple_diskusage(1 << 26, 1 << 26, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MemoryError, match="/dev/shm has room for 1000 bytes, and the KV cache of a rank has 4096"):
        share(torch.zeros(4096, dtype=torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cache_on_a_gpu_is_seen_by_another_process() -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    cache = torch.zeros(NUM_LAYERS, NUM_BLOCKS, PIECE_BYTES, dtype=torch.uint8, device="cuda")
    process = context.Process(target=_fill, args=(share(cache), there), daemon=True)
    process.start()
    assert here.recv() == 0
    process.join()
    assert bool((cache == 9).all())


def _fill(shared: SharedTensor, pipe: Connection) -> None:
    mapped = map_shared(shared)
    seen = int(mapped.max())
    mapped.fill_(9)
    torch.cuda.synchronize()
    pipe.send(seen)
