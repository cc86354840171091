"""vLLM as a column of the engine's bench: the same model, threads and chunks, in its own environment and process."""

from __future__ import annotations

import ctypes.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from services.engine.native.model.model import LoadedModel
from tests.bench.bench_engine import CHUNK, Rows, Run, prefill_batches
from tests.bench.step_process import StepProcess
from tests.compat import vllm_bench
from tests.compat.tool import BUILD

CHECKED_TOKENS = 600  # of the prompt whose logits are compared: two steps of prefill, and part of a block
_SCRIPT = Path(__file__).parent / "vllm_steps.py"
_START_TIMEOUT_S = 600.0
_TIMEOUT_S = 600.0
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}  # their names in a table
_AVX2_ONLY = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@dataclass
class WholeSteps:
    """The column of whole engine steps. Nothing runs: they are those of the runs in the column before it."""

    name: str
    last_s: float = 0.0

    def decode(self, num_sequences: int, context: int) -> Run:
        return lambda: self.last_s

    def prefill(self, length: int) -> Run:
        return lambda: self.last_s


@dataclass
class VllmColumn:
    """A run is what its model takes, measured in its process; `whole` holds the last run's whole engine steps."""

    process: StepProcess
    vocab_size: int
    name: str = "vLLM bf16"
    whole: WholeSteps = field(init=False)

    def __post_init__(self) -> None:
        self.whole = WholeSteps(f"{self.name}, whole engine")

    def decode(self, num_sequences: int, context: int) -> Run:
        self.process.ask("decode", _TIMEOUT_S, num_sequences=num_sequences, context=context)
        return lambda: self._seconds("step")

    def prefill(self, length: int) -> Run:
        token_ids = torch.cat([batch.token_ids for batch in prefill_batches(length, self.vocab_size)]).tolist()
        return lambda: self._seconds("prefill", token_ids=token_ids)

    def logits(self, token_ids: list[int]) -> tuple[int, Tensor]:
        """The token that it chooses after a prompt, and float32 logits [2, vocab_size] before and after that token."""
        answer = self.process.ask("logits", _TIMEOUT_S, token_ids=token_ids)
        return int(answer["token_id"]), torch.tensor(answer["logits"])

    def _seconds(self, order: str, **arguments: object) -> float:
        answer = self.process.ask(order, _TIMEOUT_S, **arguments)
        self.whole.last_s = float(answer["step_s"])
        return float(answer["model_s"])


@contextmanager
def vllm_column(
    model: LoadedModel, rows: Rows, repetitions: int, num_threads: int, dtype: str = "bfloat16", avx2: bool = False
) -> Iterator[VllmColumn]:
    """Start vLLM, which must be installed; `avx2`: with nothing of the processor beyond. Raises StepProcessFailed."""
    longest = max([context for _, context in rows.decode] + rows.prefill + [CHECKED_TOKENS + 1])
    command = [vllm_bench.TOOL.program("python"), str(_SCRIPT), "--model", str(model.directory), "--chunk", str(CHUNK)]
    command += ["--dtype", dtype]
    command += ["--num-sequences", str(max([batch for batch, _ in rows.decode], default=1))]
    command += ["--num-tokens", str(max(rows.num_tokens, longest)), "--longest", str(longest)]
    command += ["--num-steps", str(repetitions + 1)]
    environment = _environment(num_threads) | (_AVX2_ONLY if avx2 else {})
    with StepProcess(command, environment, BUILD / "logs" / f"vllm_steps_{dtype}.log") as process:
        process.answer("start", _START_TIMEOUT_S)
        yield VllmColumn(process, model.config.vocab_size, f"vLLM {DTYPES[dtype]}")


def preloaded() -> list[str]:
    """The libraries that vLLM's manual asks to preload on a CPU, those of them that are here."""
    openmp = BUILD / vllm_bench.TOOL.name / "lib" / "libiomp5.so"
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    return ([str(openmp)] if openmp.is_file() else []) + ([tcmalloc] if tcmalloc else [])


def _environment(num_threads: int) -> dict[str, str]:
    """One process, which runs on our processors."""
    preload = [*preloaded(), *filter(None, [os.environ.get("LD_PRELOAD")])]
    return vllm_bench.TOOL.environment() | {
        "LD_PRELOAD": ":".join(preload),
        "OMP_NUM_THREADS": str(num_threads),
        "VLLM_CACHE_ROOT": str(BUILD / "vllm_cache"),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
