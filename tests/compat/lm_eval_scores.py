"""lm-eval's local-completions on recall questions: answers generated, and answers chosen by their log-likelihood."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from deploy.demo_model.recall import make_prompt, random_code
from tests.compat.load import Target
from tests.compat.tool import BUILD, Tool

TOOL = Tool("lm_eval", "lm-eval")

_TASKS = Path(__file__).parent / "lm_eval_tasks"
_NUM_QUESTIONS = 20
_PROMPT_TOKENS = 160
_LEAST_SCORE = 0.9


def check(target: Target) -> str:
    """The scores, in words. Raises ToolFailed and AssertionError."""
    _write_questions(BUILD / "lm_eval_data" / "recall.jsonl")
    output = TOOL.scratch("results")
    shutil.rmtree(output, ignore_errors=True)
    options = f"model={target.model},base_url={target.url}/v1/completions,tokenizer={target.tokenizer}"
    command = [TOOL.program("lm_eval"), "run", "--model", "local-completions", "--model_args"]
    command += [f"{options},num_concurrent=4,max_retries=1", "--batch_size", "1"]
    command += ["--include_path", str(_TASKS), "--tasks", "recall_generated,recall_chosen"]
    TOOL.run([*command, "--output_path", str(output)])
    (report,) = output.rglob("results_*.json")
    scores = json.loads(report.read_text())["results"]
    generated, chosen = scores["recall_generated"]["exact_match,first_number"], scores["recall_chosen"]["acc,none"]
    assert min(generated, chosen) >= _LEAST_SCORE, scores
    return f"{_NUM_QUESTIONS} questions each: generated {generated:.2f}, chosen by log-likelihood {chosen:.2f}"


def _write_questions(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    lines = []
    for seed in range(_NUM_QUESTIONS):
        prompt = make_prompt(seed, _PROMPT_TOKENS)
        statement = f"{prompt.text.rpartition('What is the code of ')[2].rstrip('?')} is"
        codes = [prompt.answer, *(random_code(rng) for _ in range(3))]
        rng.shuffle(codes)
        choices = [f"The code of {statement} {code}." for code in codes]
        question = {"prompt": prompt.text, "answer": prompt.answer, "choices": choices}
        lines.append(json.dumps(question | {"label": codes.index(prompt.answer)}))
    path.write_text("\n".join(lines) + "\n")
