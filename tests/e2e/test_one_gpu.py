"""Handoffs between vLLM's workers that share one GPU, over each transport; the same on a CPU.

What a worker says that prefills by itself is the truth. On a GPU a near-tie may fall otherwise where a token is
computed in a batch of another shape, as a prompt's last one is: `transformers` says whether it was one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.completions import Answer, Client
from tests.hf_models import random_prompts, reference_logits
from tests.stack import Stack

NUM_NEW_TOKENS = 12
BLOCK_TOKENS = 32
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 200, 255, 256, 333, 512, 700)
NEAR_TIE = 0.1  # logits, whose standard deviation is 5

pytestmark = pytest.mark.vllm


@dataclass(frozen=True)
class Place:
    """Where all workers of a stack compute, and by what blocks go there."""

    device: str
    transport: str
    lane: str = ""  # that has to carry them; empty: any

    @property
    def flags(self) -> str:
        common = f"--device {self.device} --kv-transport {self.transport}"
        if self.device == "cpu":
            return common
        # Sums of float32; no profile of the memory, which several workers that start at once would spoil.
        exact = "--dtype float32 --attention-backend TRITON_ATTN --enforce-eager"
        return f"{common} {exact} --gpu-memory-utilization 0.2 --kv-cache-memory-bytes 128MiB"


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PLACES = [
    pytest.param(Place("cpu", "nixl", "cma"), id="cpu-nixl", marks=pytest.mark.slow),
    pytest.param(Place("cuda", "nixl", "cuda_ipc"), id="cuda-nixl", marks=GPU),
    pytest.param(Place("cuda", "ucxx"), id="cuda-ucxx", marks=GPU),
]


@pytest.fixture(scope="module")
def engine() -> str:
    return "vllm"


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.param
    return found


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], models: Callable[[str, str], Path], place: Place) -> Iterator[Stack]:
    worker = f"{place.flags} --num-gpu-blocks-override 256 --max-num-batched-tokens 64"
    prefill = ["--served-model-name handed-over"]
    decode = [f"{prefill[0]} --local-prefill-max-tokens 0", "--served-model-name alone --colocated"]
    with new_stack(models("llama3", "vllm"), worker, prefill=prefill, decode=decode) as stack:
        yield stack


async def test_what_is_handed_over_within_a_device_goes_on_as_where_it_was_computed(stack: Stack, place: Place) -> None:
    prompts = random_prompts(LENGTHS, seed=1)
    async with Client(stack, NUM_NEW_TOKENS) as client:  # one by one: batches are alike
        alone = [(await client.complete(prompt, model="alone")).tokens for prompt in prompts]
        answers = [await client.complete(prompt, model="handed-over") for prompt in prompts]
    for answer, prompt in zip(answers, prompts, strict=True):
        check_receipt(answer, len(prompt))
    said = [answer.tokens for answer in answers]
    if place.device == "cpu":
        assert said == alone
    else:
        gaps = [gap(stack.model, *each) for each in zip(prompts, said, alone, strict=True)]
        assert max(gaps) < NEAR_TIE, gaps
        assert gaps.count(0.0) > len(gaps) / 2, gaps
    assert stack.metric("decode-0", "tandem:digests_failed_total") == 0
    num_bytes = stack.metric("decode-0", "tandem:transfer_bytes_total", outcome="ok")
    assert num_bytes == sum(answer.receipt["handoff"]["bytes"] for answer in answers) > 0
    if place.lane:
        by_lane = stack.metric("decode-0", "tandem:transfer_bytes_total", outcome="ok", lane=place.lane)
        assert by_lane == num_bytes, stack.metrics("decode-0")
    stack.check_clean()


def check_receipt(answer: Answer, num_tokens: int) -> None:
    receipt = answer.receipt
    assert (receipt["prefill_worker_id"], receipt["decode_worker_id"]) == ("prefill-0", "decode-0")
    assert receipt["handoff"]["blocks"] == -(-num_tokens // BLOCK_TOKENS)


def gap(model: Path, prompt: list[int], one: list[int], other: list[int]) -> float:
    """How far apart the first two tokens are that differ, in logits of `transformers`; 0 where none do."""
    place = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
    if place is None:
        return 0.0
    logits = reference_logits(model, [*prompt, *one[:place]])[-1]
    return abs(float(logits[one[place]] - logits[other[place]]))
