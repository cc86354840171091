"""Brings a worker's engine up: loads the model, and has it take its first steps, so that no request waits for those."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from kvstore.block import ProofKey
from kvstore.threads import Threads
from services.engine.api import Engine
from services.engine.choice import open_engine
from services.engine.model_config import ModelError
from services.logs import detail_level, report_phase
from services.settings import tensor_parallel_size
from services.worker.assembly import WorkerParts
from services.worker.config import WorkerConfig

log = logging.getLogger(__name__)


async def load_engine(config: WorkerConfig, threads: Threads, stop: asyncio.Event) -> Engine | None:
    """Load the model in a thread; None if the worker is to stop before that is done.

    Raises ModelError, SettingsError.
    """
    started_s = time.monotonic()
    num_threads = threads_of_rank(config, len(os.sched_getaffinity(0)), os.environ)
    settings = dataclasses.replace(config, num_threads=num_threads)
    proof_key = _proof_key(config)

    def load() -> Engine:
        return open_engine(settings, proof_key, progress=partial(report_phase, "loading model"))

    loading = asyncio.ensure_future(threads.run(load))
    if not await _done_before(stop, loading):
        loading.cancel()
        return None
    engine = loading.result()
    log.log(
        detail_level(),
        "model %s (%s) loaded in %.1f s: %d blocks of %d tokens, %d more in main memory",
        config.model,
        engine.capabilities.kv_cache_dtype,
        time.monotonic() - started_s,
        engine.capabilities.num_blocks,
        engine.layout.block_size,
        engine.capabilities.num_host_blocks,
    )
    return engine


def threads_of_rank(config: WorkerConfig, num_cores: int, environ: Mapping[str, str]) -> int:
    """Returns how many threads each rank computes with: as --num-threads or OpenMP's variable says, else its share of
    the cores. Ranks wait actively for each other, and would keep cores from each other.
    """
    said = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # of nested ones, the outermost
    by_openmp = int(said) if said.isdecimal() else 0
    return config.num_threads or by_openmp or max(1, num_cores // tensor_parallel_size(config.engine_args))


def _proof_key(config: WorkerConfig) -> ProofKey:
    """What blocks are proven under. Raises SettingsError."""
    secret = config.read_proof_key()
    if secret is None:
        log.warning("no --proof-key-file: blocks are proven under a key that everybody knows, which stops no forger")
        return ProofKey.public()
    return ProofKey(secret.derive("proofs of KV blocks"))


async def warmed_up(parts: WorkerParts, timeout_s: float, stop: asyncio.Event) -> bool:
    """Warm the engine up. False: the worker is to stop before that is done. Raises ModelError."""
    warming = parts.thread.call(parts.engine.warm_up)
    if await _done_before(stop, warming, timeout_s):
        if (error := warming.exception()) is not None:
            raise ModelError(f"its first steps failed: {error}") from error
        return True
    if not stop.is_set():
        raise ModelError(f"its first steps have not ended within {timeout_s:g} s (--warm-up-timeout-s)")
    return False


async def _done_before(stop: asyncio.Event, work: asyncio.Future[Any], timeout_s: float | None = None) -> bool:
    """Wait for the work's end, whatever it is; False if the worker is to stop, or the time is up, before that."""
    stopped = asyncio.ensure_future(stop.wait())
    either: list[asyncio.Future[Any]] = [work, stopped]
    await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    return work.done()
