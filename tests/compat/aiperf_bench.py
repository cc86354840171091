"""`aiperf profile`, on /v1/completions; it reads the server's /metrics too."""

from __future__ import annotations

import json
import shutil

from tests.compat.load import Figures, Load, Target
from tests.compat.tool import Tool

TOOL = Tool("aiperf", "aiperf")


def measure(target: Target, load: Load) -> Figures:
    directory = TOOL.scratch("artifacts")
    shutil.rmtree(directory, ignore_errors=True)
    command = [TOOL.program("aiperf"), "profile", "--url", target.url, "-m", target.model]
    command += ["--tokenizer", str(target.tokenizer), "--endpoint-type", "completions", "--streaming"]
    command += ["--isl", str(load.prompt_tokens), "--osl", str(load.output_tokens), "--use-server-token-count"]
    command += ["--extra-inputs", "ignore_eos:true", "--random-seed", str(load.seed)]
    command += ["--num-dataset-entries", str(load.num_requests), "--request-count", str(load.num_requests)]
    command += ["--request-rate", str(load.rate), "--arrival-pattern", "constant"]
    command += ["--workers-max", "1", "--no-gpu-telemetry", "--ui", "none", "--output-artifact-dir", str(directory)]
    TOOL.run(command, offline=False)  # offline it takes a tokenizer from the hub's cache only, and no directory
    report = json.loads((directory / "profile_export_aiperf.json").read_text())
    num_ok = round(report["request_count"]["avg"])
    return Figures(
        num_ok=num_ok,
        num_failed=round(report["completed_request_count"]["avg"]) - num_ok,
        num_output_tokens=round(report["total_osl"]["avg"]),
        ttft_ms=report["time_to_first_token"]["p50"],
        tpot_ms=report["inter_token_latency"]["p50"],
        output_tokens_per_s=report["output_token_throughput"]["avg"],
    )
