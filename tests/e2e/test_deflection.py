"""Prompts of a burst are shared out between elastic workers by what clients are to get, and stay what they are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.completions import Client
from tests.e2e.conftest import PATIENT, PATIENT_ROUTER
from tests.hf_models import random_prompts
from tests.stack import Stack

NUM_NEW_TOKENS = 12
OBJECTIVES = "--ttft-objective 600 --tpot-objective 80"
PROFILE = {
    "origin": "a test: 200 prompt tokens take 0.4 s",
    "base_s": 0.006, "prompt_token_s": 2e-3, "prompt_pair_s": 0.0, "running_s": 5e-4, "context_token_s": 1e-7,
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stack(model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("logs")
    profile = directory / "profile.json"
    profile.write_text(json.dumps(PROFILE))
    with Stack(
        directory,
        decode=(),
        elastic=[f"--role {role} --tpot-objective 80" for role in ("prefill", "decode")],
        worker=f"{PATIENT} --paced-profile {profile} --num-gpu-blocks-override 256",
        router=f"{PATIENT_ROUTER} {OBJECTIVES}",
        model=model_of("qwen3"),
        engine="paced",
    ) as stack:
        yield stack


async def test_a_burst_bends_roles_and_no_answer(stack: Stack) -> None:
    warm_up, prompts = random_prompts([200] * 3, seed=1), random_prompts([200] * 8, seed=2)
    async with Client(stack, NUM_NEW_TOKENS) as client:
        for prompt in warm_up:  # until the router has heard how fast they are
            await client.complete(prompt)
        burst = await asyncio.gather(*(client.complete(prompt) for prompt in prompts))
        alone = [await client.complete(prompt) for prompt in prompts]
    assert [answer.tokens for answer in burst] == [answer.tokens for answer in alone]
    receipts = [answer.receipt for answer in burst]
    bent = [receipt for receipt in receipts if receipt["deflected"] or receipt["redirects"]]
    assert bent, "eight prompts of 0.4 s each, to be begun within 0.6 s, and two workers"
    assert len(bent) < len(receipts)
    num_deflected = stack.metric("router", "tandem:router_deflections_total", direction="decode")
    assert num_deflected + stack.metric("router", "tandem:router_redirects_total", direction="decode") > 0
    assert all(receipt["objectives"] == {"ttft_seconds": 0.6, "tpot_seconds": 0.08} for receipt in receipts)
    stack.check_clean()
