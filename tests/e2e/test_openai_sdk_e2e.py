"""The unmodified `openai` SDK against the whole stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from tests.hf_models import VOCAB_SIZE
from tests.openai_suite import SUITE, Capabilities
from tests.stack import Stack

pytestmark = [pytest.mark.on_vllm, pytest.mark.over("ucxx")]


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path], transport: str) -> Iterator[Stack]:
    worker = f"--kv-transport {transport} --num-gpu-blocks-override 256"
    with new_stack(model_of("qwen2_tied"), worker, prefill=[""], decode=["--local-prefill-max-tokens 0"]) as stack:
        yield stack


@pytest.mark.parametrize("behaviour", SUITE, ids=lambda behaviour: behaviour.__name__)
def test_the_suite(behaviour: Callable[[openai.OpenAI, str, Capabilities], None], stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        behaviour(client, "m", Capabilities(max_model_len=2048, vocab_size=VOCAB_SIZE))


def test_after_all_of_it_every_block_is_free(stack: Stack) -> None:
    stack.check_clean()
