"""Opens a paced engine: the native one over `KeyedKV` in the place of a model, each step as long as a profile says."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

from kvstore.block import ProofKey
from services.engine.checkpoint import WITHOUT_WEIGHTS, find_model
from services.engine.config import DTYPE_ALIASES, EngineConfig
from services.engine.model_config import UnsupportedModel, read_config
from services.engine.native import Engine, Runner
from services.engine.native.memory import choose_num_blocks, choose_num_host_slots
from services.engine.native.model import ComputePath, FingerprintBuilder, LoadedModel
from services.engine.native.scheduling import Batch, SampledBatch
from services.engine.paced.keyed_kv import KeyedKV
from services.engine.paced.profile import StepProfile, read_profile

log = logging.getLogger(__name__)

_DEFAULT_DTYPE: Final = "bfloat16"
# So many steps are judged together for whether this machine keeps the pace.
_JUDGED_STEPS: Final = 1000
_LATE_SHARE: Final = 0.05


def open_paced(
    config: EngineConfig,
    proof_key: ProofKey | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Engine:
    """Make one from a model's configuration alone. Raises `ModelError` or `SettingsError`."""
    profile = read_profile(config.paced_profile)
    directory = find_model(config.model, config.revision, WITHOUT_WEIGHTS)
    model_config = read_config(directory)
    longest = config.max_model_len or model_config.max_context_len
    if longest > model_config.max_context_len:
        raise UnsupportedModel(f"max_model_len {longest} exceeds the context of {directory}; give less")
    torch.set_num_threads(1)  # it moves bytes only
    config = replace(
        config,
        max_num_seqs=config.max_num_seqs or profile.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or profile.max_num_batched_tokens,
    )
    dtype = DTYPE_ALIASES.get(config.dtype, config.dtype)
    dtype = (model_config.dtype or _DEFAULT_DTYPE) if dtype == "auto" else dtype
    # Not that of any model with weights: its blocks are of use to paced workers only.
    plain = FingerprintBuilder().finish(model_config, dtype)
    root = hashlib.blake2b(plain.encode(), digest_size=16, person=b"tandem.paced")
    model = LoadedModel(
        directory=directory,
        config=model_config,
        dtype=dtype,
        device="cpu",
        fingerprint=root.hexdigest(),
        max_model_len=longest,
        computation=KeyedKV(model_config.vocab_size, root.digest()[:8]),
        compute_path=ComputePath(
            "paced", "none", "nothing: a simulation", is_simulation=True, numerics="paced", is_exact=True
        ),
    )
    block_bytes = model.block_layout(config.block_size).block_bytes
    num_blocks = choose_num_blocks(config, block_bytes, longest, "cpu")
    num_host_slots = choose_num_host_slots(config, block_bytes, num_blocks * block_bytes, "cpu")
    log.warning(
        "this worker computes nothing: it is a simulation, steps take as long as profile %s says (%s)",
        profile.name,
        profile.origin,
    )
    return Engine(
        model,
        config,
        num_blocks,
        clock,
        num_host_slots,
        wrap_runner=lambda runner: PacedRunner(runner, profile, sleep),
        proof_key=proof_key,
    )


@dataclass
class PacedRunner:
    """Lets each step take what the profile says, as far as this machine does its own part of it in less."""

    runner: Runner
    profile: StepProfile
    sleep: Callable[[float], None]
    clock: Callable[[], float] = time.perf_counter
    num_steps: int = 0
    num_late: int = 0  # that took longer than they should, of the last thousand at most

    def run(self, batch: Batch) -> SampledBatch:
        """Run it, and sleep for the rest of its time."""
        started_s = self.clock()
        sampled = self.runner.run(batch)
        left_s = self.profile.step_s(batch.shape) - (self.clock() - started_s)
        if left_s > 0:
            self.sleep(left_s)
        self._judge(left_s)
        return sampled

    def _judge(self, left_s: float) -> None:
        self.num_steps += 1
        self.num_late += left_s < 0
        if self.num_steps == _JUDGED_STEPS:
            if self.num_late > _LATE_SHARE * _JUDGED_STEPS:
                share = self.num_late / _JUDGED_STEPS
                log.warning("%.0f %% of steps took longer than profile %s says", 100 * share, self.profile.name)
            self.num_steps = self.num_late = 0
