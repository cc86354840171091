"""The unmodified `openai` SDK against the whole stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest

from tests.hf_models import VOCAB_SIZE, write_model
from tests.openai_suite import SUITE, Capabilities
from tests.stack import Stack


@pytest.fixture(scope="module", params=["ucxx", "nixl"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp(f"sdk-{request.param}")
    model = write_model(directory / "model", "qwen2_tied")
    worker = ["--model", str(model), "--served-model-name", "tiny", "--kv-transport", request.param]
    worker += ["--num-gpu-blocks-override", "256"]
    with Stack(directory / "logs", [()], [["--local-prefill-max-tokens", "0"]], worker=worker) as running:
        yield running


@pytest.mark.parametrize("behaviour", SUITE, ids=lambda behaviour: behaviour.__name__)
def test_the_suite(behaviour: Callable[[openai.OpenAI, str, Capabilities], None], stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        behaviour(client, "tiny", Capabilities(max_model_len=2048, vocab_size=VOCAB_SIZE))


def test_after_all_of_it_every_block_is_free(stack: Stack) -> None:
    stack.check_clean()
