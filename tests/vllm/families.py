"""Which model families vLLM computes behind the port, and which it refuses: `python -m tests.vllm.families [family…]`.

Each is a random model as `transformers` writes it. A prompt's blocks go from one engine to another, in one process and
by router and workers; what comes is held against what one engine says by itself and against `transformers` in float32,
greedily. Without names all run (half an hour on two cores). What came out right gets its row in the tables of
docs/models.md, one by one, so that what ends early can be gone on with by name.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import httpx
import torch

from tests.documents import rows_of, with_table
from tests.engine_contract.test_engine_contract import ask, copy, prefill, reserve, run, taken, tokens
from tests.engine_contract.vllm_engines import VllmEngines
from tests.hf_models import random_prompts, reference_greedy, reference_logits, write_config, write_model
from tests.quantized_models import quantize
from tests.stack import Stack, preload

PAGE: Final = Path(__file__).parents[2] / "docs" / "models.md"
LENGTHS: Final = (1, 2, 5, 17, 31, 32, 33, 63, 64, 65, 100, 127, 129, 200, 256, 257, 300, 511, 777, 900)
NUM_OUTPUTS: Final = 12
TOLERANCE: Final = 1.2  # logits; their standard deviation is 5, and bfloat16 of `transformers` itself is off by as much
_MLA = "--attention-backend CPU_MLA"


@dataclass(frozen=True)
class Family:
    """A model to try. `packed`: by what its weights are (`tests.quantized_models`)."""

    name: str
    title: str
    remark: str = ""
    dtype: str = "float32"
    block_size: int = 32
    engine_args: str = ""
    chunk_sizes: tuple[int, ...] = (64, 256)
    packed: str = ""


@dataclass(frozen=True)
class Verdict:
    """Of `num_prompts` prompts, how many came out equal, and how far the worst token was from the best one."""

    chunk_size: int
    num_prompts: int
    num_as_colocated: int
    num_as_transformers: int
    worst_gap: float  # in logits of `transformers`, given the tokens before
    colocated: list[list[int]]  # what one engine says by itself

    @property
    def is_right(self) -> bool:
        """All as colocated, and as far from `transformers` as rounding to bfloat16 goes."""
        return self.num_as_colocated == self.num_prompts and self.worst_gap < TOLERANCE


_WINDOWS = "windows of 64 tokens on two layers of three"
_LATENT = "one latent vector a token; on CPUs by `CPU_MLA`: whole prompts, no prefix cache"


def _latent(name: str, title: str) -> Family:
    return Family(name, title, _LATENT, block_size=16, engine_args=_MLA, chunk_sizes=(1024,))


def _packed(method: str, title: str) -> Family:
    return Family("qwen2_wide", f"Qwen2, {title}", "4 bits in groups of 32", dtype="bfloat16", packed=method)


FAMILIES: Final = (
    Family("llama_wide", "Llama 3"),
    Family("mistral_full", "Mistral"),
    Family("qwen2_wide", "Qwen2"),
    Family("qwen3", "Qwen3"),
    Family("gemma2", "Gemma 2", f"{_WINDOWS}; soft-capping"),
    Family("gemma3", "Gemma 3 (text)", _WINDOWS),
    Family("phi", "Phi 1, 2"),
    Family("phi3", "Phi 3, 4"),
    Family("olmo2", "OLMo 2"),
    Family("gpt_neox", "GPT-NeoX"),
    Family("qwen3_moe", "Qwen3-MoE", "8 experts"),
    Family("mixtral", "Mixtral", "4 experts"),
    _latent("deepseek_v2", "DeepSeek-V2"),
    _latent("deepseek_v3", "DeepSeek-V3"),
    _packed("gptq", "GPTQ"),
    _packed("awq", "AWQ"),
)


@dataclass(frozen=True)
class Refused:
    """A model that cannot be served, of which only config.json is written, and words that the refusal has."""

    name: str
    title: str
    words: str


REFUSED: Final = (
    Refused(
        "mistral_window", "a sliding window on all layers (Mistral 7B v0.1)", "all its layers have a sliding window"
    ),
    Refused("mamba", "no attention (Mamba)", "a state that each token overwrites"),
    Refused("bamba", "recurrent layers beside attention (Bamba, Jamba, Qwen3-Next …)", "a state that each token"),
    Refused("bart", "encoder and decoder (BART, T5, Whisper)", "reads what an encoder made"),
    Refused("qwen2_vl", "images, sound, video (Qwen2-VL …)", "takes images, sound or video"),
    Refused("bert", "no text is made (BERT, embedding models)", "makes embeddings, scores or classes"),
)


def prompts_of(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """The last with the one before as its prefix."""
    prompts = random_prompts(lengths, seed=5)
    prompts[-1][: lengths[-2]] = prompts[-2]
    return prompts


def write_family(family: Family, directory: Path) -> tuple[Path, Path]:
    """Write the model for `transformers`, and as it is served; the same, unless its weights are packed."""
    oracle = write_model(directory / "model", family.name, seed=1)
    return oracle, (quantize(oracle, directory / "packed", family.packed) if family.packed else oracle)


def through_workers(family: Family, directory: Path, chunk_size: int) -> list[list[int]]:
    """What router, prefill and decode worker say after `prompts_of()`; the model is written to `directory`."""
    _, model = write_family(family, directory)
    worker = ["--block-size", str(family.block_size), "--num-gpu-blocks-override", str(4096 // family.block_size)]
    worker += ["--max-model-len", "1024", "--max-num-batched-tokens", str(chunk_size), "--dtype", family.dtype]
    worker += ["--peer-timeout-s", "20", "--engine-args", family.engine_args]
    decode = ["--local-prefill-max-tokens 0"]
    outputs = []
    with (
        Stack(directory / "stack", prefill=[""], decode=decode, worker=worker, model=model, engine="vllm") as stack,
        httpx.Client(base_url=stack.url, timeout=240) as http,
    ):
        for prompt in prompts_of():
            body = {"model": "m", "prompt": prompt, "max_tokens": NUM_OUTPUTS, "temperature": 0, "ignore_eos": True}
            answer = http.post("/v1/completions", json=body | {"return_token_ids": True, "receipt": True}).json()
            (receipt,) = answer["receipt"]["sequences"]
            assert not receipt["prefilled_locally"], receipt
            outputs.append(answer["choices"][0]["token_ids"])
        stack.check_clean()
    return outputs


def num_equal_through_workers(family: Family, alone: Verdict) -> int:
    """How many of router's and workers' answers are what one engine says by itself."""
    with tempfile.TemporaryDirectory() as directory:
        served = through_workers(family, Path(directory), alone.chunk_size)
    return sum(map(list.__eq__, served, alone.colocated))


def check_family(
    family: Family, directory: Path, lengths: Sequence[int] = LENGTHS, chunk_sizes: Sequence[int] = ()
) -> list[Verdict]:
    """Run the family's model, written to `directory`, in this process."""
    prompts = prompts_of(lengths)
    oracle, served = write_family(family, directory)
    expected = reference_greedy(oracle, prompts, NUM_OUTPUTS, ignore_eos=True)
    verdicts = []
    for chunk_size in chunk_sizes or family.chunk_sizes:
        engines = VllmEngines(
            served,
            dtype=family.dtype,
            block_size=family.block_size,
            max_model_len=1024,
            num_gpu_blocks_override=4096 // family.block_size,
            max_num_batched_tokens=chunk_size,
            engine_args=family.engine_args,
        )
        first, second = engines.make(), engines.make()
        handed = [hand_over(first, second, prompt) for prompt in prompts]
        engines.take_back()
        alone = engines.make()
        colocated = [tokens(run(alone, ask("r", prompt, max_tokens=NUM_OUTPUTS)), "r") for prompt in prompts]
        engines.take_back()
        told = zip(prompts, handed, expected, strict=True)
        gaps = [0.0 if output == wanted else gap(oracle, prompt, output) for prompt, output, wanted in told]
        verdicts.append(
            Verdict(
                chunk_size,
                len(prompts),
                sum(map(list.__eq__, handed, colocated)),
                sum(map(list.__eq__, handed, expected)),
                max(gaps),
                colocated,
            )
        )
    return verdicts


def hand_over(first: Any, second: Any, prompt: Sequence[int]) -> list[int]:
    """What `second` says after `prompt`, whose blocks `first` computes."""
    block_ids, updates = prefill(first, "r", prompt)
    request = ask("r", prompt, max_tokens=NUM_OUTPUTS)
    room = reserve(second, request)
    copy(first, block_ids[room.num_present :], second, room.block_ids[room.num_present :])
    proofs = [block.proof for update in updates for block in update.blocks]
    second.add_prefilled(request, room.block_ids, proofs, taken(second, updates[-1].new_tokens[0]))
    first.release_blocks(block_ids)
    output = tokens(run(second), "r")
    for engine in (first, second):
        assert (engine.load().num_lent_blocks, engine.load().num_free_blocks) == (0, engine.load().num_blocks)
    return output


def gap(oracle: Path, prompt: Sequence[int], output: Sequence[int]) -> float:
    """How far the worst token of `output` is from the one that `transformers` would have said there, in logits."""
    logits = reference_logits(oracle, [*prompt, *output[:-1]])[len(prompt) - 1 :]
    chosen = logits.gather(1, logits.new_tensor(output).long().unsqueeze(1)).squeeze(1)
    return float((logits.max(dim=1).values - chosen).max())


def refusal_of(refused: Refused, directory: Path) -> str:
    """What a worker says that is told to serve the model; empty if it serves it."""
    from kvstore.block import ProofKey
    from services.engine.choice import check_for_vllm
    from services.engine.config import EngineConfig
    from services.engine.model_config import ModelError
    from services.engine.vllm import open_vllm

    path = write_config(directory / "model", refused.name)
    config = EngineConfig(
        str(path),
        engine="vllm",
        device="cpu",
        dtype="float32",
        block_size=32,
        max_model_len=256,
        kv_cache_memory_bytes=1 << 26,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        engine_args="--load-format dummy",
    )
    try:
        check_for_vllm(config)
        open_vllm(config, ProofKey.public())
    except ModelError as error:
        return str(error).removeprefix(f"{path}/config.json: ").replace(str(path), "the model")
    return ""


# ---- the tables ----------------------------------------------------------------------------

_RUNS: Final = (
    "| family | disaggregated = colocated | = `transformers`, float32 | prompts in chunks of | |\n"
    "|---|---|---|---|---|\n"
)
_REFUSALS: Final = "| model | what the worker says |\n|---|---|\n"


def row(family: Family, verdicts: Sequence[Verdict], num_served: int) -> str:
    """A line of the table of what runs; `num_served`: answers through router and workers that are one engine's."""
    num_prompts = sum(each.num_prompts for each in verdicts)
    as_colocated = sum(each.num_as_colocated for each in verdicts)
    as_transformers = sum(each.num_as_transformers for each in verdicts)
    known = f"{as_transformers} of {num_prompts}"
    if as_transformers < num_prompts:
        known += f"; its choice by {max(each.worst_gap for each in verdicts):.1f} at most"
    chunks = ", ".join("whole" if each.chunk_size > max(LENGTHS) else str(each.chunk_size) for each in verdicts)
    remark = "; ".join(filter(None, (family.dtype if family.dtype != "float32" else "", family.remark)))
    handed_over = f"{as_colocated + num_served} of {2 * num_prompts}"  # in one process, and by workers
    return f"| {family.title} | {handed_over} | {known} | {chunks} | {remark} |\n"


def _tell(head: str, known: Sequence[Family | Refused], title: str, line: str, *, is_right: bool) -> None:
    """Print a row and, if it is right, put it into its table on the page, in the order of `known`."""
    print(line, end="", flush=True)
    if not is_right:
        return
    page = PAGE.read_text(encoding="utf-8")
    rows = {each.split("|")[1].strip(): each for each in rows_of(page, head)} | {title: line}
    PAGE.write_text(
        with_table(page, head, [rows[each.title] for each in known if each.title in rows]), encoding="utf-8"
    )


def _apart(job: Callable[[Path], Any]) -> Any:
    """Run `job` in a fork of this process, which has imported vLLM; returns what it returns, or raises its error."""

    def work(end: Connection) -> None:
        with tempfile.TemporaryDirectory() as directory:
            try:
                end.send((True, job(Path(directory))))
            except BaseException as error:
                end.send((False, f"{type(error).__name__}: {error}"))
                raise

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(theirs,))
    child.start()
    theirs.close()
    try:
        is_right, answer = ours.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the process ended by itself, with {child.exitcode}") from None
    child.join()
    if not is_right:
        raise RuntimeError(answer)
    return answer


def main() -> int:
    """Run what is named, or all of it, and write those rows of the page that came out right."""
    known = [*(family.title for family in FAMILIES), *(refused.title for refused in REFUSED)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("titles", nargs="*", metavar="family", help="; ".join(known))
    wanted = parser.parse_args().titles
    if unknown := set(wanted) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {'; '.join(known)}")
    import vllm.v1.engine.core  # noqa: F401

    torch.set_num_threads(1)
    preload("vllm")
    num_wrong = 0
    for family in FAMILIES:
        if not wanted or family.title in wanted:
            try:
                verdicts = _apart(lambda directory, family=family: check_family(family, directory))  # type: ignore[misc]
                num_served = sum(num_equal_through_workers(family, each) for each in verdicts)
            except (RuntimeError, AssertionError) as error:
                print(f"{family.title}: {error}", flush=True)
                num_wrong += 1
                continue
            is_right = num_served == sum(each.num_prompts for each in verdicts)
            is_right = is_right and all(each.is_right for each in verdicts)
            num_wrong += not is_right
            _tell(_RUNS, FAMILIES, family.title, row(family, verdicts, num_served), is_right=is_right)
    for refused in REFUSED:
        if not wanted or refused.title in wanted:
            said = _apart(lambda directory, refused=refused: refusal_of(refused, directory))  # type: ignore[misc]
            is_right = bool(said) and refused.words in said
            num_wrong += not is_right
            line = f"| {refused.title} | {' '.join(said.split())[:400]} |\n"
            _tell(_REFUSALS, REFUSED, refused.title, line, is_right=is_right)
    return min(num_wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
