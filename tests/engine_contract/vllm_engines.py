"""Real vLLM engines for tests: several in one process, each loaded once, as new for every test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from kvstore.block import ProofKey
from services.engine.checkpoint import safetensors_files
from services.engine.choice import vllm_version
from services.engine.config import EngineConfig

DEVICE: Final = "cpu" if (vllm_version() or "+cpu").endswith("+cpu") else "cuda"
"""Where the vLLM that is installed computes."""
BACKEND: Final = {"cpu": "CPU_ATTN", "cuda": "TRITON_ATTN"}[DEVICE]
# On a GPU many share one, and sums are of float32 as on a CPU, where greedy tokens are told apart.
_ON_A_GPU: Final = {"dtype": "float32", "kv_cache_memory_bytes": 128 << 20, "gpu_memory_utilization": 0.1}
_FLAGS: Final = {"cpu": "", "cuda": f"--attention-backend {BACKEND} --enforce-eager"}[DEVICE]


class VllmEngines:
    """Lends engines over one model; `take_back` makes those that were lent as new again.

    A process of vLLM's has one KV connector for its rank, which it keeps in a global: each call of an engine puts its
    own there first.
    """

    def __init__(self, model: Path, engine_args: str = "", **settings: Any) -> None:
        self._config = EngineConfig(
            str(model),
            engine="vllm",
            device=DEVICE,
            engine_args=f"{_FLAGS} {engine_args}".strip(),
            **{**(_ON_A_GPU if DEVICE == "cuda" else {}), **settings},
        )
        self._idle: list[tuple[Any, Any]] = []  # core, its rank's connector
        self._lent: list[tuple[Any, Any]] = []

    def divided(self, num_ranks: int) -> VllmEngines:
        """Others, of several ranks; skips the test where there are fewer GPUs."""
        if DEVICE == "cuda" and torch.cuda.device_count() < num_ranks:
            pytest.skip(f"needs {num_ranks} CUDA devices")
        others = VllmEngines(Path(self._config.model))
        flags = f"{self._config.engine_args} --tensor-parallel-size {num_ranks}"
        others._config = replace(self._config, engine_args=flags.strip())
        return others

    def make(self) -> Any:
        """Lend one."""
        from services.engine.vllm import opening

        if not self._idle:
            self._idle.append(self._load())
        core, rank = self._idle.pop()
        self._lent.append((core, rank))
        _put(rank)
        config = opening.with_device_defaults(self._config, None)
        weights = safetensors_files(Path(config.model))
        engine = opening._around(core, config, weights, ProofKey.public(), lambda share: None)
        return _InTurn(engine, rank)

    def lose(self) -> None:
        """Those that were lent are of no use any more."""
        for core, _ in self._lent:
            core.shutdown()
        self._lent.clear()

    def take_back(self) -> None:
        """Forget what they have cached. One of which a failed test still holds blocks is not used again."""
        for core, rank in self._lent:
            _put(rank)
            core.step_fn()  # tells its runner of those that have ended
            if core.reset_prefix_cache():
                core.scheduler.kv_cache_manager.take_events()
                self._idle.append((core, rank))
        self._lent.clear()

    def close(self) -> None:
        """End them, and the processes of their ranks."""
        for core, rank in (*self._idle, *self._lent):
            _put(rank)
            core.shutdown()
        self._idle.clear()

    def _load(self) -> tuple[Any, Any]:
        from vllm.distributed.kv_transfer import kv_transfer_state
        from vllm.platforms import current_platform

        from services.engine.vllm import opening
        from services.engine.vllm.arguments import prepare_environment

        prepare_environment()
        _put(None)
        core, _ = opening._open_core(self._config, Path(self._config.model))
        rank = kv_transfer_state._KV_CONNECTOR_AGENT
        if rank is not None:
            # Done once a process that computes: where it looks for its kernels it stumbles over numba, which came with
            # the first engine.
            type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
        return core, rank


def _put(rank: Any) -> None:
    from vllm.distributed.kv_transfer import kv_transfer_state

    kv_transfer_state._KV_CONNECTOR_AGENT = rank


class _InTurn:
    """An engine whose every call finds its own connector in vLLM's global."""

    def __init__(self, engine: Any, rank: Any) -> None:
        self.__dict__.update(_engine=engine, _rank=rank)

    def __getattr__(self, name: str) -> Any:
        _put(self._rank)
        return getattr(self._engine, name)
