"""Decoding with guesses, by n-grams or a draft model, beside decoding without: tokens per second, changed tokens.

    python -m tests.bench.bench_speculation
    python -m tests.bench.bench_speculation --model /models/qwen2-0.5b --rows "B = 1"

Without --model: the random Qwen2 of bench_engine. Random weights quote nothing, so the texts are prescribed: the engine
computes and samples every step, and then the text's token stands where the sampled one would. What was sampled on the
way must be the same with guesses as without. For the draft model the upper layers of the same model add little, and the
draft has the lower ones alone: they agree often. One whose tokens are exchanged never agrees.

One thread; seconds are of the processor, so that what else runs counts little. Both engines take turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from services.engine.api import Request, SampledToken, SamplingParams
from services.engine.config import EngineConfig
from services.engine.native import Engine
from services.engine.native.sampling import NoToken, Sampler, SamplingRow
from tests.bench.bench_model import write_bench_model
from tests.draft_models import damp_upper_layers, permute_head, write_draft
from tests.hf_models import random_prompts

_ROOT = Path(__file__).parents[2]
_TOKENIZER = _ROOT / "services/cli/demo_model/tandem-demo/tokenizer.json"
_BATCHES = (1, 8, 32)
TARGET = 2.0
"""Times the tokens per second, for one sequence that copies; and no token changed."""


@dataclass(frozen=True)
class Workload:
    """A prompt, and what is to be said after it."""

    name: str
    prompt: list[int]
    answer: list[int]


def workloads(num_tokens: int) -> list[Workload]:
    """A renaming in a source file, an answer that quotes passages, and one that quotes nothing."""
    tokenizer = Tokenizer.from_file(str(_TOKENIZER))

    def tokens(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    code = (_ROOT / "services/machine.py").read_text(encoding="utf-8")[:1200]
    renamed = code.replace("return", "yield").replace("path", "file_name").replace("def ", "async def ")
    passages = (_ROOT / "docs/tiers.md").read_text(encoding="utf-8").split("\n\n")[1:5]
    quoted = [f"As source {i} says: {passage[:150]}" for i, passage in enumerate(reversed(passages), start=1)]
    source = random.Random(1)
    return [
        Workload("code edit", tokens(f"{code}\nRename what is returned.\n"), tokens(renamed)[:num_tokens]),
        Workload("quotes of passages", tokens("\n\n".join(passages)), tokens("\n".join(quoted))[:num_tokens]),
        Workload("nothing is repeated", tokens(code), source.sample(range(3, 2000), num_tokens)),
    ]


@dataclass
class Prescribed:
    """Samples, and says what is prescribed; the last one sampled at a place is kept."""

    inner: Sampler
    text: Sequence[int] = ()
    sampled: dict[int, int] = field(default_factory=dict)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | NoToken]:
        for row, token in zip(rows, self.inner.sample(logits, rows), strict=True):
            assert isinstance(token, SampledToken)
            self.sampled[row.position] = token.token_id
        return [SampledToken(self.text[row.position] if row.position < len(self.text) else 0) for row in rows]


def open_engine(model: str, method: str, draft: str = "") -> Engine:
    """One thread, warmed up; it learns of seconds of the processor."""
    config = EngineConfig(
        model,
        speculative_method=method,
        speculative_model=draft,
        device="cpu",
        num_threads=1,
        num_gpu_blocks_override=1600,
        max_model_len=4096,
    )
    engine = Engine.from_config(config, clock=time.process_time)
    engine.warm_up()
    return engine


@dataclass
class Column:
    """An engine that says what is prescribed."""

    engine: Engine
    sampler: Prescribed

    @classmethod
    def open(cls, model: str, method: str) -> Column:
        engine = open_engine(model, method)
        runner = engine._runner
        runner._sampler = sampler = Prescribed(runner._sampler)  # type: ignore[attr-defined]
        return cls(engine, sampler)

    def seconds(self, workload: Workload, num_sequences: int) -> tuple[float, int]:
        """Of all steps after all first tokens, and how many of them there were."""
        self.sampler.text = [*workload.prompt, *workload.answer]
        self.sampler.sampled.clear()
        sampling = SamplingParams(temperature=0.0, max_tokens=len(workload.answer), ignore_eos=True)
        for number in range(num_sequences):
            self.engine.add_request(Request(f"r{number}", workload.prompt, sampling))
        begun: set[str] = set()
        while len(begun) < num_sequences:
            begun |= {update.request.request_id for update in self.engine.step().updates if update.new_tokens}
        started_s, num_steps = time.process_time(), 0
        while self.engine.has_work:
            self.engine.step()
            num_steps += 1
        return time.process_time() - started_s, num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a bfloat16 model; default: a random one of 0.39 B parameters")
    parser.add_argument("--num-tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rows", default="", help='only rows whose name contains this, e.g. "B = 1,"')
    parser.add_argument("--method", default="", choices=("", "ngram", "draft_model"), help="only this one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if arguments.method != "ngram":
            draft_rows(Path(directory), arguments.num_tokens, arguments.repetitions, arguments.rows)
        if arguments.method == "draft_model":
            return
        model = arguments.model or str(write_bench_model(Path(directory)))
        columns = [Column.open(model, method) for method in ("off", "ngram")]
        print(f"\nkernels: {columns[0].engine.capabilities.compute['kernels']}; medians of {arguments.repetitions}\n")
        print("| answer | plain, tok/s | n-grams, tok/s | ratio | tokens a step | changed tokens |")
        print("|---|---|---|---|---|---|")
        for workload in workloads(arguments.num_tokens):
            for num_sequences in _BATCHES:
                name = f"{workload.name}, B = {num_sequences}, context {len(workload.prompt):,}"
                if arguments.rows in name:
                    print(f"| {name} | {_row(columns, workload, num_sequences, arguments.repetitions)} |", flush=True)


_NUM_LOWER, _FACTOR = 2, 0.1
"""Of 24 layers, those that the draft has; how much of what it would add each of the others adds."""


def draft_rows(directory: Path, num_tokens: int, repetitions: int, wanted: str) -> None:
    """The table of draft models: one that often agrees, and one that never does."""
    model = damp_upper_layers(write_bench_model(directory / "damped"), _NUM_LOWER, _FACTOR)
    lower = write_draft(directory / "lower", model, _NUM_LOWER)
    other = permute_head(write_draft(directory / "other", model, _NUM_LOWER))
    plain = open_engine(str(model), "off")
    print("\n| draft model | plain, tok/s | with it, tok/s | ratio | tokens a step | came true | changed tokens |")
    print("|---|---|---|---|---|---|---|")
    for name, draft in (("often right", lower), ("never right", other)):
        guessing = open_engine(str(model), "draft_model", str(draft))
        for temperature, num_sequences in ((0.0, 1), (0.8, 1), (0.0, 8)):
            row = f"{name}, {'greedy' if not temperature else f'T = {temperature:g}'}, B = {num_sequences},"
            if wanted in row:
                sampling = SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True, seed=3)
                told = _draft_row([plain, guessing], sampling, num_sequences, repetitions)
                print(f"| {row.rstrip(',')} | {told} |", flush=True)


def _draft_row(engines: Sequence[Engine], sampling: SamplingParams, num_sequences: int, repetitions: int) -> str:
    seconds: list[list[float]] = [[] for _ in engines]
    before = engines[1].stats
    num_steps = num_changed = num_said = 0
    for repetition in range(repetitions):
        prompts = random_prompts([128] * num_sequences, seed=repetition)
        texts = []
        for i, engine in enumerate(engines):
            took_s, num_steps_here, said = _generate(engine, prompts, sampling)
            seconds[i].append(took_s)
            texts.append(said)
            num_steps += num_steps_here * i
        pairs = [pair for a, b in zip(*texts, strict=True) for pair in zip(a, b, strict=True)]
        num_changed += sum(a != b for a, b in pairs)
        num_said += len(pairs)
    stats = engines[1].stats
    num_tried = stats.num_draft_tokens - before.num_draft_tokens
    num_true = stats.num_accepted_tokens - before.num_accepted_tokens
    plain, guessed = (num_said / repetitions / statistics.median(each) for each in seconds)
    return (
        f"{plain:,.1f} | {guessed:,.1f} | {guessed / plain:.2f} | {num_said / num_sequences / num_steps:.1f}"
        f" | {num_true} of {num_tried} | {num_changed} of {num_said}"
    )


def _generate(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingParams
) -> tuple[float, int, list[list[int]]]:
    """Seconds and number of all steps after all first tokens, and the texts."""
    texts: dict[str, list[int]] = {f"r{number}": [] for number in range(len(prompts))}
    for name, prompt in zip(texts, prompts, strict=True):
        engine.add_request(Request(name, list(prompt), sampling))
    started_s, num_steps = 0.0, 0
    while engine.has_work:
        if not num_steps and all(texts.values()):
            started_s = time.process_time()
        for update in engine.step().updates:
            texts[update.request.request_id] += [token.token_id for token in update.new_tokens]
        num_steps += bool(started_s)
    return time.process_time() - started_s, num_steps, list(texts.values())


def _row(columns: Sequence[Column], workload: Workload, num_sequences: int, repetitions: int) -> str:
    seconds: list[list[float]] = [[] for _ in columns]
    num_steps = [0 for _ in columns]
    for _ in range(repetitions):
        for i, column in enumerate(columns):
            took_s, num_steps[i] = column.seconds(workload, num_sequences)
            seconds[i].append(took_s)
    num_said = len(workload.answer) - 1
    plain, guessed = (num_said * num_sequences / statistics.median(each) for each in seconds)
    places = range(len(workload.prompt), len(workload.prompt) + len(workload.answer))
    sampled = [[column.sampler.sampled[place] for place in places] for column in columns]
    num_changed = sum(a != b for a, b in zip(*sampled, strict=True))
    met = f" (target {TARGET:g})" if num_sequences == 1 and workload.name != "nothing is repeated" else ""
    return (
        f"{plain:,.1f} | {guessed:,.1f} | {guessed / plain:.2f}{met} | {num_said / num_steps[1]:.1f}"
        f" | {num_changed} of {len(places)}"
    )


if __name__ == "__main__":
    main()
