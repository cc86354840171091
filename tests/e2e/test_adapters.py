"""LoRA adapters, and guesses by n-grams, over HTTP through vLLM's workers: as `transformers` with merged weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.hf_models import merge_adapter, random_prompts, reference_greedy, write_adapter
from tests.stack import Stack

pytestmark = pytest.mark.vllm
if importlib.util.find_spec("vllm") is None:  # `make test` is free of it
    pytest.skip("vLLM is not installed", allow_module_level=True)

NUM_NEW_TOKENS = 12
BLOCK_SIZE = 32
NGRAM = '{"method":"ngram","num_speculative_tokens":2,"prompt_lookup_max":2}'


@pytest.fixture(scope="module")
def engine() -> str:
    return "vllm"


def test_each_adapter_says_its_own_through_both_workers_and_no_prefix_is_shared(
    new_stack: Callable[..., Stack], model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model, prompt = model_of("llama3"), random_prompts([150], seed=1)[0]
    adapters = {name: write_adapter(tmp_path / name, model, seed=seed) for seed, name in enumerate(("sql", "prose"))}
    merged = {name: merge_adapter(tmp_path / f"merged-{name}", model, path) for name, path in adapters.items()}
    worker = f"--block-size {BLOCK_SIZE} --num-gpu-blocks-override 64 --max-model-len 512 --lora-modules"
    worker += "".join(f" {name}={path}" for name, path in adapters.items())
    decode = ["--local-prefill-max-tokens", "0", "--speculative-config", NGRAM]
    with new_stack(model, worker=worker, prefill=[""], decode=[decode]) as stack, httpx.Client(timeout=240) as http:
        url = f"{stack.url}/v1"
        parents = {each["id"]: each["parent"] for each in http.get(f"{url}/models").json()["data"]}
        assert parents == {"m": None, "sql": "m", "prose": "m"}
        for name, directory in {"m": model, **merged}.items():
            expected = reference_greedy(directory, [prompt], NUM_NEW_TOKENS, ignore_eos=True)
            body = {"model": name, "prompt": prompt, "max_tokens": NUM_NEW_TOKENS, "temperature": 0, "ignore_eos": True}
            for num_reused in (0, len(prompt) // BLOCK_SIZE * BLOCK_SIZE):  # its own blocks alone
                answer = http.post(f"{url}/completions", json=body | {"return_token_ids": True, "receipt": True}).json()
                assert answer["choices"][0]["token_ids"] == expected[0]
                (receipt,) = answer["receipt"]["sequences"]
                assert receipt["reused_tokens"] == num_reused
        unknown = http.post(f"{url}/completions", json={"model": "nope", "prompt": prompt})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
