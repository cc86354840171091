"""What int8 costs in exactness: logits against transformers in float32, and questions answered by the demo model.

python -m tests.bench.bench_int8_error --num-prompts 50
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Tokenizer
from torch import Tensor

from services.engine.native.kernels.choice import choose_kernels
from services.engine.native.model.model import LoadedModel, load_model
from tests.engine_model.paged_run import PagedRun, Sequenced
from tests.hf_models import random_prompts, reference_logits, write_model

_ROOT = Path(__file__).parents[2]
_DEMO = _ROOT / "services/cli/demo_model/tandem-demo"
_BLOCK_SIZE = 32
_MAX_ANSWER_TOKENS = 16
# What is computed with: name of the row, and settings of `load_model`.
_PATHS = (
    ("torch, bfloat16", {"cpu_kernels": "torch"}),
    ("kernels, bfloat16", {}),
    ("kernels, int8", {"quantization": "int8"}),
    ("kernels, int8 KV", {"kv_cache_dtype": "int8"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    arguments = parser.parse_args()
    if choose_kernels().library is None:
        raise SystemExit(f"int8 needs the CPU kernels, and here computes {choose_kernels().reason}")
    recall = _load_recall()
    tokenizer = Tokenizer.from_file(str(_DEMO / "tokenizer.json"))
    prompts = [
        recall.make_prompt(20_000_000 + seed, arguments.prompt_tokens, tokenizer)
        for seed in range(arguments.num_prompts)
    ]
    with tempfile.TemporaryDirectory() as directory:
        random_model = write_model(Path(directory) / "model", "qwen3", dtype="bfloat16", num_hidden_layers=8)
        print("| what computes | model | largest | mean | same argmax | KL, mean | answers right |")
        print("|---|---|---|---|---|---|---|")
        for name, settings in _PATHS:
            for label, path, texts in (
                ("random, 8 layers", random_model, random_prompts([256])),
                ("demo", _DEMO, [tokenizer.encode(prompt.text).ids for prompt in prompts[:4]]),
            ):
                model = load_model(str(path), **settings)  # type: ignore[arg-type]
                row = _compare(model, texts, path)
                right = "" if label != "demo" else f"{_num_right(model, tokenizer, recall, prompts)} of {len(prompts)}"
                print(f"| {name} | {label} | {row} | {right} |", flush=True)


def _compare(model: LoadedModel, texts: Sequence[list[int]], path: Path) -> str:
    ours = torch.cat([_run(model, text).whole(text, chunk=256) for text in texts])
    exact = torch.cat([reference_logits(path, text) for text in texts])
    difference = (ours - exact).abs()
    same = (ours.argmax(-1) == exact.argmax(-1)).float().mean()
    kl = torch.nn.functional.kl_div(ours.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean")
    return f"{difference.max():.3f} | {difference.mean():.4f} | {100 * same:.1f} % | {kl:.5f}"


def _run(model: LoadedModel, text: Sequence[int]) -> PagedRun:
    num_blocks = -(-(len(text) + _MAX_ANSWER_TOKENS) // _BLOCK_SIZE) + 1
    return PagedRun(model, num_blocks=num_blocks, block_size=_BLOCK_SIZE)


def _num_right(model: LoadedModel, tokenizer: Tokenizer, recall: ModuleType, prompts: Sequence[object]) -> int:
    num_right = 0
    for prompt in prompts:
        new: list[int] = tokenizer.encode(prompt.text).ids  # type: ignore[attr-defined]
        run, sequence, answer = _run(model, new), Sequenced(), []
        while len(answer) < _MAX_ANSWER_TOKENS:
            logits = run.model.forward(run.batch([(sequence, new)], all_logits=False), run.kv_cache)
            new = [_argmax(logits)]
            if new[0] in model.eos_token_ids:
                break
            answer += new
        num_right += recall.is_correct(tokenizer.decode(answer), prompt.answer)  # type: ignore[attr-defined]
    return num_right


def _argmax(logits: Tensor) -> int:
    return int(logits[-1].argmax())


def _load_recall() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recall", _ROOT / "deploy/demo_model/recall.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recall"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
