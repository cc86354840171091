"""Reads a trace as the requests of a plan: lengths scaled, times stretched, prompts cut to what a worker can hold."""

from __future__ import annotations

import random
from pathlib import Path

from loadtest.plan import BLOCK_TOKENS, Scale, read_trace, spread_ties, stretched
from services.cli.config import PlanConfig
from services.planner import PlannedRequest, Workload

_SEED = "plan"


def read_workload(config: PlanConfig) -> Workload:
    """The requests. Raises ValueError for a file that is no trace, naming the line."""
    path = Path(config.trace)
    found = read_trace(path, config.num_requests)
    if not found:
        raise ValueError(f"{path} has no requests")
    # With room for the answer's last token in the worker's memory.
    room = max(config.num_blocks * config.block_size - 1, 1)
    max_output = min(config.max_output_tokens, max(room // 2, 1))
    scale = Scale(config.scale, min(config.max_prompt_tokens, max(room - max_output, 1)), max_output)
    times_s = spread_ties([each.at_s for each in found], random.Random(_SEED))
    times_s = [at_s - times_s[0] for at_s in times_s]
    if config.rate:
        times_s = stretched(times_s, config.rate)
    requests = [
        PlannedRequest(at_s, scale.prompt_tokens(each), scale.output_tokens(each), each.block_ids)
        for at_s, each in sorted(zip(times_s, found, strict=True), key=lambda pair: pair[0])
    ]
    num_cut = sum(map(scale.cuts, found))
    description = f"{path.name}: {len(requests):,} requests"
    if config.scale != 1:
        description += f", lengths times {config.scale:g}"
    if num_cut:
        description += f", {num_cut:,} of them cut to {scale.max_prompt_tokens:,} + {scale.max_output_tokens:,} tokens"
    return Workload(requests, max(1, round(BLOCK_TOKENS * config.scale)), description)
