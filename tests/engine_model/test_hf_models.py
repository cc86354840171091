"""The tiny models that other suites build on are what they claim to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from tests.hf_models import (
    EOS_TOKEN_IDS,
    FAMILIES,
    VOCAB_SIZE,
    random_prompts,
    reference_greedy,
    reference_logits,
    write_model,
)

ModelDir = Callable[..., Path]


def test_the_same_seed_writes_the_same_files_and_another_one_others(tmp_path: Path) -> None:
    a, b, c = (write_model(tmp_path / name, "qwen2", seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    names = sorted(path.name for path in a.iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < set(names)
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    assert (a / "model.safetensors").read_bytes() != (c / "model.safetensors").read_bytes()


def test_the_tokenizer_round_trips_any_text_and_has_a_chat_template(model_dir: ModelDir) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir("qwen2"))
    text = "banor tesku: 4711, naïve 東京 🚲\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < VOCAB_SIZE == len(tokenizer)
    assert len(tokenizer.encode("bandes lopi")) < len("bandes lopi")
    assert tokenizer.eos_token_id in EOS_TOKEN_IDS
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(chat)[0] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_far_enough_from_ties(family: str, model_dir: ModelDir) -> None:
    (prompt,) = random_prompts([60], seed=11)
    (generated,) = reference_greedy(model_dir(family), [prompt], max_new_tokens=30, ignore_eos=True)
    best, second = reference_logits(model_dir(family), prompt + generated)[59:-1].topk(2).values.T
    assert len(generated) == 30
    assert bool(((best - second) > 1e-3).all())


def test_generation_stops_at_an_end_of_sequence_token_unless_told_not_to(model_dir: ModelDir) -> None:
    prompts = random_prompts([5, 70, 200], seed=4)
    stopped = reference_greedy(model_dir("llama2"), prompts, max_new_tokens=24)
    endless = reference_greedy(model_dir("llama2"), prompts, max_new_tokens=24, ignore_eos=True)
    for short, long in zip(stopped, endless, strict=True):
        ends = [i for i, token in enumerate(long) if token in EOS_TOKEN_IDS]
        assert short == (long[: ends[0] + 1] if ends else long)
    assert stopped != endless
