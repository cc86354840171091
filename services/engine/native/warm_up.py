"""Computes made-up tokens before the first request comes, so that this one waits for nothing that is done but once.

The first steps of a process load kernels (a GPU's, when they are first called), choose algorithms, make threads and
take workspaces. How long the second ones take says how long a request's will.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from services.engine.api import StepOutput
from services.engine.native.runner import Runner
from services.engine.native.scheduling import Batch, Request, ScheduledSequence, SchedulerConfig
from services.engine.request import SamplingParams

_NUM_PROMPT_TOKENS = 64


def warm_up(runner: Runner, limits: SchedulerConfig, num_blocks: int, clock: Callable[[], float]) -> list[StepOutput]:
    """Run a prompt and a step after it, twice, greedy and sampled. Return the second time's shapes and durations.

    Writes to the lowest of the pool's `num_blocks`, which nobody may hold; none is findable afterwards.
    """
    block_size = limits.block_size
    max_num_tokens = min(limits.max_num_batched_tokens, limits.max_model_len, num_blocks * block_size)
    outputs: list[StepOutput] = []
    for temperature in (1.0, 0.0):
        outputs = [_run(runner, batch, clock) for batch in _batches(block_size, max_num_tokens, temperature)]
    return outputs


def _batches(block_size: int, max_num_tokens: int, temperature: float) -> Iterator[Batch]:
    num_tokens = min(_NUM_PROMPT_TOKENS, max_num_tokens - 1)
    request = Request("warm-up", (0,) * num_tokens, SamplingParams(temperature=temperature))
    request.block_table = list(range(-(-(num_tokens + 1) // block_size)))
    prompt = ScheduledSequence(request, 0, num_tokens, is_first=True, needs_sample=True, num_prompt_logprobs=None)
    yield Batch((prompt,), new_block_ids=tuple(request.block_table))
    request.output_token_ids.append(0)
    request.token_ids.append(0)
    following = ScheduledSequence(request, num_tokens, 1, is_first=False, needs_sample=True, num_prompt_logprobs=None)
    yield Batch((following,))


def _run(runner: Runner, batch: Batch, clock: Callable[[], float]) -> StepOutput:
    started_s = clock()
    runner.run(batch)
    return StepOutput(num_tokens=batch.num_tokens, shape=batch.shape, duration_s=clock() - started_s)
