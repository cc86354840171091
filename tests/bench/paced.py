"""Flags of `tandem up` for a fleet whose engine is paced: measured step times, two cores left to everything else."""

from __future__ import annotations

import json
from pathlib import Path

PROFILE = {
    "origin": "a bench",
    "base_s": 0.008, "prompt_token_s": 4e-4, "prompt_pair_s": 1.7e-9, "running_s": 2e-5, "context_token_s": 4e-8,
    "max_num_seqs": 256, "max_num_batched_tokens": 1024,
}  # fmt: skip
"""A tenth of a GPU's prefill, so that two cores carry ten times its capacity in requests."""


def paced_flags(directory: Path) -> list[str]:
    """One prefill worker and one decode worker; their profile is written to `directory`."""
    path = directory / "bench.json"
    path.write_text(json.dumps(PROFILE))
    paced = ["--engine", "paced", "--paced-profile", str(path), "--num-gpu-blocks-override", "4000"]
    return [*paced, "--prefill", "1", "--decode", "1"]
