"""`make compat`: unmodified third-party tools, each at a pinned version, against a Tandem started for them.

    python -m tests.compat                     # all tools, on a stack of the demo model
    python -m tests.compat --url http://…      # on a server that runs already
    python -m tests.compat vllm lm_eval        # some of them

Prints one table and ends with status 1 if a tool failed. Environments, logs and reports are in build/compat. The
requirements are whole environments, made by `uv pip compile` without torchvision, torchaudio and torchcodec, which
vLLM's benchmark does not need.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from loadtest.send import start_stack, stop_stack
from tests.compat import aiperf_bench, guidellm_bench, lm_eval_scores, vllm_bench
from tests.compat.load import Load, Measure, Target
from tests.compat.tool import REPOSITORY, Tool, ToolFailed

TOKENIZER = REPOSITORY / "services" / "cli" / "demo_model" / "tandem-demo"
LOAD = Load(num_requests=40, rate=2, prompt_tokens=100, output_tokens=32)


@dataclass(frozen=True)
class Check:
    """`run` returns what to say of a success, and raises ToolFailed or AssertionError."""

    tool: Tool
    run: Callable[[Target], str]
    install: Callable[[str], None]


def measuring(measure: Measure) -> Callable[[Target], str]:
    """The check that a measuring tool gets all that it asks for."""

    def run(target: Target) -> str:
        figures = measure(target, LOAD)
        figures.check(LOAD)
        return str(figures)

    return run


def client(tool: Tool, script: str) -> Check:
    """A script of ours that uses a library, run in the library's environment."""

    def run(target: Target) -> str:
        path = Path(__file__).parent / script
        return tool.run([tool.program("python"), str(path), target.url, target.model]).strip().splitlines()[-1]

    return Check(tool, run, tool.install)


CHECKS = (
    client(Tool("litellm", "litellm"), "litellm_client.py"),
    client(Tool("langchain_openai", "langchain-openai"), "langchain_client.py"),
    Check(lm_eval_scores.TOOL, lm_eval_scores.check, lm_eval_scores.TOOL.install),
    Check(vllm_bench.TOOL, measuring(vllm_bench.measure), vllm_bench.install),
    Check(guidellm_bench.TOOL, measuring(guidellm_bench.measure), guidellm_bench.TOOL.install),
    Check(aiperf_bench.TOOL, measuring(aiperf_bench.measure), aiperf_bench.TOOL.install),
)


@contextmanager
def running_target(url: str):
    """The server at `url`, or else one of the demo model that lives as long as the block."""
    stack = None if url else start_stack("compat", [])
    try:
        address = url or stack.url
        model = httpx.get(f"{address}/v1/models").raise_for_status().json()["data"][0]["id"]
        yield Target(address, model, TOKENIZER)
    finally:
        if stack is not None:
            stop_stack(stack)


def main() -> int:
    names = [check.tool.name for check in CHECKS]
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__.splitlines()[0])
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--url", default="", help="a running server, with the demo model")
    parser.add_argument("--torch-index", default="", help="where torch comes from; default: the package index")
    flags = parser.parse_args()
    if unknown := set(flags.tools) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [check for check in CHECKS if not flags.tools or check.tool.name in flags.tools]
    for check in chosen:
        check.install(flags.torch_index)
    table = Table("tool", "version", "outcome", "figures")
    failures: list[str] = []
    with running_target(flags.url) as target:
        for check in chosen:
            print(f"{check.tool.name}: running", flush=True)
            try:
                outcome, figures = "ok", check.run(target)
            except (ToolFailed, AssertionError) as error:
                outcome, figures = "FAILED", "see above"
                failures.append(f"{check.tool.name}: {error}")
            table.add_row(check.tool.name, check.tool.version, outcome, figures)
    for failure in failures:
        print(failure, file=sys.stderr)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
