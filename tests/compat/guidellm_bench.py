"""`guidellm run`, on /v1/completions."""

from __future__ import annotations

import json

from tests.compat.load import Figures, Load, Target
from tests.compat.tool import Tool

TOOL = Tool("guidellm", "guidellm")


def measure(target: Target, load: Load) -> Figures:
    report = TOOL.scratch("report.json")
    command = [TOOL.program("guidellm"), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={target.url},request_format=/v1/completions"]
    command += ["--profile", f"kind=constant,rate={load.rate}"]
    command += ["--constraint", f"kind=max_requests,count={load.num_requests}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={target.tokenizer}"]
    lengths = f"prompt_tokens={load.prompt_tokens},output_tokens={load.output_tokens}"
    command += ["--data", f"kind=synthetic_text,{lengths}", "--seed", f"kind=static,value={load.seed}"]
    command += ["--output", f"kind=json,path={report}"]
    TOOL.run(command)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    metrics = {name: each["successful"] for name, each in benchmark["metrics"].items() if "successful" in (each or ())}
    return Figures(
        num_ok=totals["successful"],
        num_failed=totals["errored"] + totals["incomplete"],
        num_output_tokens=round(metrics["output_token_count"]["total_sum"]),
        ttft_ms=metrics["time_to_first_token_ms"]["median"],
        # What guidellm calls the time per output token has the first token in it.
        tpot_ms=metrics["inter_token_latency_ms"]["median"],
        output_tokens_per_s=metrics["output_tokens_per_second"]["mean"],
    )
