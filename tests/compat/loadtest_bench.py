"""Our own load test, by its command line, as the third-party tools are run."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.compat.load import Figures, Load, Target
from tests.compat.tool import BUILD, REPOSITORY

_TIMEOUT_S = 600.0


def measure(target: Target, load: Load) -> Figures:
    report = BUILD / "output" / "loadtest.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "loadtest", "run", "--url", target.url, "--json", str(report)]
    command += ["--rate", str(load.rate), "--num-requests", str(load.num_requests), "--arrivals", "constant"]
    command += ["--prompt-tokens", str(load.prompt_tokens), "--output-tokens", str(load.output_tokens)]
    command += ["--warmup-requests", "0", "--seed", str(load.seed)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=_TIMEOUT_S)
    summary = json.loads(report.read_text())["summary"]
    return Figures(
        num_ok=summary["num_ok"],
        num_failed=summary["num_errors"] + summary["num_refusals"] + summary["num_lost"],
        num_output_tokens=round(summary["num_ok"] * summary["output_tokens"]),
        ttft_ms=summary["ttft"]["p50"] * 1000,
        tpot_ms=summary["tpot"]["p50"] * 1000,
        output_tokens_per_s=summary["output_token_rate"],
    )
