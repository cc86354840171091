"""The controller of roles over real processes: a fleet without a prefill worker gets one, and its streams go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.completions import Client
from tests.e2e.conftest import PATIENT, PATIENT_ROUTER
from tests.hf_models import random_prompts, reference_greedy
from tests.stack import Stack
from tests.waiting import until

NUM_NEW_TOKENS = 12
OBJECTIVES = "--ttft-objective 60000 --tpot-objective 10000"
PACE = "--controller-window-s 1 --controller-dwell-s 1"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(model_of: Callable[[str], Path]) -> Path:
    return model_of("qwen3")


@pytest.fixture(scope="module")
def stack(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(
        tmp_path_factory.mktemp("logs"),
        decode=(),
        elastic=["--role decode --tpot-objective 10000"] * 3,
        worker=f"{PATIENT} --num-gpu-blocks-override 256 --max-num-batched-tokens 64",
        router=f"{PATIENT_ROUTER} {OBJECTIVES} {PACE}",
        model=model,
    ) as stack:
        yield stack


async def test_a_worker_is_flipped_under_streams_and_says_so(stack: Stack, model: Path) -> None:
    prompts = random_prompts([15, 40, 64, 200], seed=1)
    expected = reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    async with Client(stack, NUM_NEW_TOKENS) as client:

        async def row() -> dict[str, Any]:
            (found,) = (await client.http.get("/debug/controller")).json()["models"]
            return dict(found)

        def roles() -> list[object]:
            return sorted(str(stack.debug_state(f"elastic-{index}")["role_now"]) for index in range(3))

        async def is_flipped() -> bool:
            answers = await asyncio.gather(*(client.complete(prompt) for prompt in prompts))
            assert [answer.tokens for answer in answers] == expected
            return roles() == ["decode", "decode", "prefill"]

        async with asyncio.timeout(60):
            while not await is_flipped():
                pass
        await until(lambda: stack.metric("router", "tandem:controller_flips_total", role="prefill") == 1)
        found = await row()
        (flip,) = [each for each in found["decisions"] if each["decision"] == "flip"]
        (change,) = flip["changes"]
        assert change["role"] == "prefill"
        assert flip["counterfactual"]
        assert found["is_leader"]
        # It computes prompts for the others now.
        for _ in range(3):
            assert await is_flipped()
    assert stack.metric(change["worker_id"], "tandem:prefill_orders_total", outcome="finished") > 0
    stack.check_clean()
