"""The engine's logits are those of `transformers`, however a sequence is cut up, placed and batched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.engine.native.model import linear
from services.engine.native.model.model import LoadedModel, load_model
from tests.engine_model.paged_run import PagedRun, Sequenced
from tests.hf_models import FAMILIES, random_prompts, reference_greedy, reference_logits

Loaded = Callable[..., LoadedModel]
ModelDir = Callable[..., Path]

# Largest and mean absolute difference of any logit from `transformers` in float32 over the same (rounded) weights.
# Logits have a standard deviation of 5. For comparison, `transformers` itself in that dtype is off from its float32 by
# up to 1.2 (mean 0.08) in bfloat16 and 0.12 (mean 0.01) in float16.
TOLERANCES = {
    "float32": (2e-4, 1e-5),
    "bfloat16": (1.2, 0.09),
    "float16": (0.05, 0.004),
}


def assert_close(ours: torch.Tensor, exact: torch.Tensor, dtype: str) -> None:
    difference = (ours - exact).abs()
    largest, mean = TOLERANCES[dtype]
    assert difference.max() < largest
    assert difference.mean() < mean


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_transformers(family: str, dtype: str, model_dir: ModelDir, loaded: Loaded) -> None:
    (token_ids,) = random_prompts([300])
    exact = reference_logits(model_dir(family, dtype=dtype), token_ids)
    ours = PagedRun(loaded(family, dtype=dtype)).whole(token_ids, chunk=64)
    assert ours.dtype == torch.float32
    assert_close(ours, exact, dtype)


@pytest.mark.parametrize("chunk", [1, 16, 64, 300, 512, None])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunking_does_not_change_the_logits(
    family: str, chunk: int | None, model_dir: ModelDir, loaded: Loaded
) -> None:
    (token_ids,) = random_prompts([150 if chunk == 1 else 700], seed=1)
    exact = reference_logits(model_dir(family), token_ids)
    assert_close(PagedRun(loaded(family), seed=2).whole(token_ids, chunk=chunk), exact, "float32")


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_block_size_does_not_change_the_logits(block_size: int, model_dir: ModelDir, loaded: Loaded) -> None:
    (token_ids,) = random_prompts([200], seed=2)
    exact = reference_logits(model_dir("mistral"), token_ids)
    ours = PagedRun(loaded("mistral"), num_blocks=16, block_size=block_size).whole(token_ids, chunk=48)
    assert_close(ours, exact, "float32")


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3"])
def test_prefill_chunks_and_decode_tokens_of_many_sequences_share_a_batch(
    family: str, model_dir: ModelDir, loaded: Loaded
) -> None:
    prompts = random_prompts([1, 40, 333, 90, 17, 150, 64, 65], seed=3)
    run = PagedRun(loaded(family), num_blocks=90)
    sequences = [Sequenced() for _ in prompts]
    collected: list[list[torch.Tensor]] = [[] for _ in prompts]
    chunks = [1, 20, 111, 1, 16, 37, 64, 5]  # tokens per step, so that each step mixes lengths and contexts
    while any(s.num_cached < len(p) for s, p in zip(sequences, prompts, strict=True)):
        work = [
            (b, prompts[b][s.num_cached : s.num_cached + chunks[b]])
            for b, s in enumerate(sequences)
            if s.num_cached < len(prompts[b])
        ]
        for (b, _), logits in zip(work, run.step([(sequences[b], new) for b, new in work]), strict=True):
            collected[b].append(logits)
    for prompt, logits in zip(prompts, collected, strict=True):
        assert_close(torch.cat(logits), reference_logits(model_dir(family), prompt), "float32")


def test_greedy_decoding_gives_the_tokens_of_transformers(model_dir: ModelDir, loaded: Loaded) -> None:
    prompts = random_prompts([5, 70, 200], seed=4)
    expected = reference_greedy(model_dir("llama2"), prompts, max_new_tokens=24, ignore_eos=True)
    run = PagedRun(loaded("llama2"))
    sequences = [Sequenced() for _ in prompts]
    new = prompts
    generated: list[list[int]] = [[] for _ in prompts]
    for _ in range(24):
        logits = run.step(list(zip(sequences, new, strict=True)))
        new = [[int(rows[-1].argmax())] for rows in logits]
        for tokens, (token,) in zip(generated, new, strict=True):
            tokens.append(token)
    assert generated == expected


def test_layers_with_and_without_a_sliding_window_mix(model_dir: ModelDir, loaded: Loaded) -> None:
    settings = {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}
    model = loaded("qwen2", **settings)
    assert model.config.sliding_windows == (None, 48, 48)
    (token_ids,) = random_prompts([260], seed=5)
    exact = reference_logits(model_dir("qwen2", **settings), token_ids)
    assert_close(PagedRun(model).whole(token_ids, chunk=100), exact, "float32")
    assert_close(PagedRun(model).whole(token_ids[:120], chunk=1), exact[:120], "float32")


def test_only_the_requested_rows_of_logits_are_computed(loaded: Loaded) -> None:
    prompts = random_prompts([30, 1, 50], seed=6)
    full = PagedRun(loaded("qwen3")).step([(Sequenced(), prompt) for prompt in prompts])
    run = PagedRun(loaded("qwen3"))
    batch = run.batch([(Sequenced(), prompt) for prompt in prompts], all_logits=False)
    logits = run.model.forward(batch, run.kv_cache)
    assert logits.shape == (3, run.model.config.vocab_size)
    torch.testing.assert_close(logits, torch.stack([rows[-1] for rows in full]), rtol=0, atol=1e-4)


def test_a_batch_that_wants_no_logits_still_fills_the_cache(loaded: Loaded) -> None:
    model = loaded("qwen2")
    (token_ids,) = random_prompts([100], seed=7)
    expected = PagedRun(model).whole(token_ids)
    run, sequence = PagedRun(model), Sequenced()
    batch = run.batch([(sequence, token_ids[:80])])
    silent = type(batch)(**{**vars(batch), "logits_indices": torch.zeros(0, dtype=torch.int64)})
    assert model.forward(silent, run.kv_cache).shape == (0, model.config.vocab_size)
    (logits,) = run.step([(sequence, token_ids[80:])])
    torch.testing.assert_close(logits, expected[80:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama3", "mistral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_finite_garbage_outside_the_contexts_changes_nothing(family: str, dtype: str, loaded: Loaded) -> None:
    prompts = random_prompts([37, 90, 5], seed=8)

    def run_all(poison: float) -> list[torch.Tensor]:
        run = PagedRun(loaded(family, dtype=dtype), num_blocks=40)
        run.kv_cache.fill_(poison)
        sequences = [Sequenced() for _ in prompts]
        run.step([(s, p[:-1]) for s, p in zip(sequences, prompts, strict=True)])
        return run.step([(s, p[-1:]) for s, p in zip(sequences, prompts, strict=True)])

    for clean, poisoned in zip(run_all(0.0), run_all(1e30), strict=True):
        assert torch.equal(clean, poisoned)


def test_a_cpu_without_bfloat16_computes_in_float32_and_stores_bfloat16(
    model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_dir("qwen2", dtype="bfloat16")
    native = load_model(str(path))
    monkeypatch.setattr(linear, "cpu_has_bfloat16", lambda: False)
    emulated = load_model(str(path), cpu_kernels="torch")
    (token_ids,) = random_prompts([100], seed=9)
    run = PagedRun(emulated)
    difference = (run.whole(token_ids) - reference_logits(path, token_ids)).abs()
    assert run.kv_cache.dtype == torch.bfloat16
    assert emulated.fingerprint == native.fingerprint
    assert difference.mean() < 0.03  # keys and values are rounded, nothing else


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_can_be_chosen(dtype: str, model_dir: ModelDir) -> None:
    path = model_dir("qwen3")
    model = load_model(str(path), dtype=dtype)
    (token_ids,) = random_prompts([80], seed=10)
    assert model.dtype == dtype
    assert model.new_kv_cache(2, 16).dtype == getattr(torch, dtype)
    assert_close(PagedRun(model).whole(token_ids), reference_logits(path, token_ids), dtype)
