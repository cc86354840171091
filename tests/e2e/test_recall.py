"""The demo model recalls facts from anywhere in a full context: right only if every block arrived where it belongs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from tokenizers import Tokenizer

from tests.stack import Stack

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "services" / "cli" / "demo_model" / "tandem-demo"
NUM_PROMPTS = 50
MAX_ANSWER_TOKENS = 16

pytestmark = pytest.mark.over("nixl")


def load_recall() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recall", ROOT / "deploy" / "demo_model" / "recall.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], transport: str) -> Iterator[Stack]:
    # A machine that is busy elsewhere makes this slow, and nothing else.
    worker = f"--kv-transport {transport} --lease-s 60 --peer-timeout-s 60"
    with new_stack(MODEL, worker, prefill=[""], decode=["--local-prefill-max-tokens 0"]) as stack:
        yield stack


def test_recall_at_full_context_disaggregated(stack: Stack) -> None:
    recall = load_recall()
    context = json.loads((MODEL / "config.json").read_text())["max_position_embeddings"]
    assert context >= 2048
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompts = [
        recall.make_prompt(10_000_000 + seed, context - MAX_ANSWER_TOKENS, tokenizer) for seed in range(NUM_PROMPTS)
    ]
    longest = max(len(tokenizer.encode(prompt.text).ids) for prompt in prompts)
    assert context - 128 <= longest + MAX_ANSWER_TOKENS <= context

    def answer(prompt: str) -> str:
        body = {"model": "m", "prompt": prompt, "max_tokens": MAX_ANSWER_TOKENS, "temperature": 0}
        response = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=350)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(answer, [prompt.text for prompt in prompts]))
    num_right = sum(recall.is_correct(text, prompt.answer) for text, prompt in zip(answers, prompts, strict=True))
    assert num_right >= NUM_PROMPTS - 1, f"{num_right} of {NUM_PROMPTS} right"
    stack.check_clean()
