"""Writes the files that are made from others: the PrometheusRule from `rules/`, the Grafana dashboard from `PANELS`.

    make render-deploy

The validator compares what lies there with what this gives.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

DIRECTORY = Path(__file__).parent
_WIDTH, _HEIGHT = 24, 8


@dataclass(frozen=True)
class Panel:
    """A graph over time; `queries` by legend, in Grafana's notation."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    description: str = ""


@dataclass(frozen=True)
class Row:
    """A heading, and panels side by side under it."""

    title: str
    panels: tuple[Panel, ...]


_BY_ROUTER = 'model_name=~"$model",role="router"'


def _quantile(quantile: float, metric: str, matchers: str = "", by: str = "le") -> str:
    return f"histogram_quantile({quantile}, {_rate(f'{metric}_bucket', by, matchers)})"


def _quantiles(metric: str, matchers: str) -> dict[str, str]:
    return {f"p{100 * quantile:g}": _quantile(quantile, metric, matchers) for quantile in (0.5, 0.9, 0.99)}


def _rate(metric: str, by: str = "", matchers: str = "") -> str:
    selector = f"{metric}{{{matchers}}}" if matchers else metric
    return f"sum {f'by ({by}) ' if by else ''}(rate({selector}[$__rate_interval]))"


def _increase(metric: str) -> str:
    return f"sum by (instance) (increase({metric}[$__rate_interval]))"


ROWS = (
    Row(
        "What clients see",
        (
            Panel("Time to first token", _quantiles("vllm:time_to_first_token_seconds", _BY_ROUTER), "s"),
            Panel("Time between tokens", _quantiles("vllm:inter_token_latency_seconds", _BY_ROUTER), "s"),
            Panel("Whole requests", _quantiles("vllm:e2e_request_latency_seconds", _BY_ROUTER), "s"),
            Panel(
                "Requests by status",
                {"{{status}}": _rate("tandem:router_requests_total", "status")},
                "reqps",
                "A stream that broke counts under its error; 499 is a client that left.",
            ),
            Panel(
                "Share of requests that failed",
                {"5 minutes": "fleet:request_errors:ratio_5m", "1 hour": "fleet:request_errors:ratio_1h"},
                "percentunit",
                "Errors of ours (5xx) among requests for completions. Refusals for lack of room (429) are none.",
            ),
            Panel("Refused, by reason", {"{{reason}}": _rate("tandem:router_refusals_total", "reason")}, "reqps"),
        ),
    ),
    Row(
        "Load",
        (
            Panel(
                "Requests",
                {
                    "running": f"sum(vllm:num_requests_running{{{_BY_ROUTER}}})",
                    "without a token yet": f"sum(vllm:num_requests_waiting{{{_BY_ROUTER}}})",
                },
            ),
            Panel(
                "Tokens per second",
                {
                    "prompt": _rate("vllm:prompt_tokens_total", matchers=_BY_ROUTER),
                    "generated": _rate("vllm:generation_tokens_total", matchers=_BY_ROUTER),
                },
            ),
            Panel(
                "Why workers were chosen",
                {"{{reason}}, prefill: {{prefill}}": _rate("tandem:router_decisions_total", "reason, prefill")},
                "reqps",
            ),
        ),
    ),
    Row(
        "Prefill",
        (
            Panel(
                "Queue, in tokens",
                {"{{instance}}": 'sum by (instance) (tandem:waiting_tokens{role=~"prefill|elastic"})'},
            ),
            Panel(
                "Wait for a prefill worker",
                {
                    "p50": _quantile(0.5, "vllm:request_queue_time_seconds", 'role=~"prefill|elastic"'),
                    "p99": _quantile(0.99, "vllm:request_queue_time_seconds", 'role=~"prefill|elastic"'),
                    "of a prompt that comes now": "fleet:prefill_queue:seconds",
                },
                "s",
            ),
            Panel(
                "Prompt tokens computed per second",
                {"{{instance}}": _rate("vllm:prompt_tokens_total", "instance", 'role=~"prefill|elastic"')},
            ),
            Panel(
                "Share of time in steps",
                {"{{instance}}": _rate("tandem:step_seconds_sum", "instance", 'role=~"prefill|elastic"')},
                "percentunit",
            ),
            Panel(
                "Prompt tokens, by where their KV came from",
                {"{{source}}": _rate("tandem:router_receipt_prompt_tokens_total", "source")},
                "short",
                "Computed, reused where the prompt was prefilled, or fetched from another holder.",
            ),
            Panel(
                "Share of prompt tokens not computed", {"cached": "fleet:prompt_tokens_cached:ratio_5m"}, "percentunit"
            ),
        ),
    ),
    Row(
        "Handoff",
        (
            Panel(
                "Stages, mean",
                {
                    "{{stage}}": 'sum by (stage) (rate(tandem:request_stage_seconds_sum{role=~"decode|elastic",'
                    'stage=~"order|prefill_queue|prefill|read|confirm|join"}[$__rate_interval]))'
                    ' / sum by (stage) (rate(tandem:request_stage_seconds_count{role=~"decode|elastic",'
                    'stage=~"order|prefill_queue|prefill|read|confirm|join"}[$__rate_interval]))'
                },
                "s",
                "They follow each other without a gap. read, confirm and join are what the handoff adds to a request.",
            ),
            Panel(
                "Last chunk to running batch",
                _quantiles("tandem:request_stage_seconds", 'role=~"decode|elastic",stage="handoff"'),
                "s",
            ),
            Panel(
                "Transferred",
                {"{{role}}, {{lane}}, {{outcome}}": _rate("tandem:transfer_bytes_total", "role, lane, outcome")},
                "Bps",
            ),
            Panel(
                "Speed of one read, median",
                {"{{lane}}": _quantile(0.5, "tandem:transfer_bytes_per_second", by="le, lane")},
                "Bps",
            ),
            Panel("Failed handoffs, by cause", {"{{cause}}": _rate("tandem:handoff_failures_total", "cause")}, "reqps"),
            Panel(
                "Blocks with wrong bytes",
                {
                    "{{instance}}, received": _increase("tandem:digests_failed_total"),
                    "{{instance}}, kept": _increase("tandem:store_corrupt_blocks_total"),
                },
                "short",
                "Always 0. No such block was used.",
            ),
        ),
    ),
    Row(
        "Decode",
        (
            Panel(
                "KV blocks in use",
                {"{{instance}}": 'sum by (instance) (vllm:kv_cache_usage_perc{role=~"prefill|decode|elastic"})'},
                "percentunit",
                "Blocks that only the cache holds count as free.",
            ),
            Panel(
                "Running requests",
                {"{{instance}}": 'sum by (instance) (vllm:num_requests_running{role=~"decode|elastic"})'},
            ),
            Panel(
                "Step time, median",
                {"{{instance}}": _quantile(0.5, "tandem:step_seconds", 'role=~"decode|elastic"', "le, instance")},
                "s",
            ),
            Panel(
                "Batch, mean",
                {
                    "{{instance}}": _rate("tandem:step_sequences_sum", "instance", 'role=~"decode|elastic"')
                    + " / "
                    + _rate("tandem:step_sequences_count", "instance", 'role=~"decode|elastic"')
                },
            ),
            Panel("Computed again, by cause", {"{{cause}}": _rate("tandem:recomputes_total", "cause")}, "reqps"),
            Panel(
                "Preemptions",
                {"{{instance}}": _rate("vllm:num_preemptions_total", "instance", 'role=~"decode|elastic"')},
                "reqps",
            ),
        ),
    ),
    Row(
        "Prefix store and index",
        (
            Panel("Blocks kept", {"{{instance}}, {{tier}}": "sum by (instance, tier) (tandem:store_blocks)"}),
            Panel("Blocks asked for, by where they were", {"{{tier}}": _rate("tandem:store_queries_total", "tier")}),
            Panel(
                "Prefixes fetched",
                {"{{tier}}, {{outcome}}": _rate("tandem:prefix_fetches_total", "tier, outcome")},
                "reqps",
            ),
            Panel(
                "Index look-ups",
                {
                    "p50": _quantile(0.5, "tandem:router_index_lookup_seconds"),
                    "p99": _quantile(0.99, "tandem:router_index_lookup_seconds"),
                },
                "s",
            ),
            Panel(
                "Redis answers",
                {
                    "{{instance}}, registry": "tandem:router_registry_up",
                    "{{instance}}, index": "tandem:router_index_up",
                },
                "bool_on_off",
            ),
            Panel("Processes", {"{{job}}": 'sum by (job) (up{job=~"tandem-.*"})'}),
        ),
    ),
)


def dashboard() -> str:
    """The dashboard's JSON."""
    panels: list[dict[str, object]] = []
    top = 0
    for row in ROWS:
        place = {"x": 0, "y": top, "w": _WIDTH, "h": 1}
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": place,
                "panels": [],
            }
        )
        top += 1
        for index, panel in enumerate(row.panels):
            width = _WIDTH // 3
            place = {"x": width * (index % 3), "y": top + _HEIGHT * (index // 3), "w": width, "h": _HEIGHT}
            panels.append(_panel(panel, len(panels) + 1, place))
        top += _HEIGHT * -(-len(row.panels) // 3)
    model = {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": "label_values(vllm:num_requests_running, model_name)", "refId": "model"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }
    source = {"name": "datasource", "label": "Source", "type": "datasource", "query": "prometheus"}
    content = {
        "uid": "tandem",
        "title": "Tandem",
        "tags": ["tandem"],
        "schemaVersion": 39,
        "editable": True,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source, model]},
        "panels": panels,
    }
    return json.dumps(content, indent=1) + "\n"


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, object]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    targets = [
        {"refId": chr(ord("A") + index), "datasource": source, "expr": query, "legendFormat": legend}
        for index, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 8, "showPoints": "never"}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": targets,
    }


def prometheus_rule(directory: Path = DIRECTORY) -> str:
    """The rules as the Prometheus operator takes them."""
    paths = sorted((directory / "rules").glob("*.yml"))
    groups = [group for path in paths for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "tandem"},
        "spec": {"groups": groups},
    }
    head = "# Made from rules/ by `make render-deploy`.\n"
    text: str = yaml.safe_dump(manifest, sort_keys=False, width=116)
    return head + text


def outputs(directory: Path = DIRECTORY) -> dict[Path, str]:
    """What there is to write, by path."""
    return {
        directory / "prometheusrule.yaml": prometheus_rule(directory),
        directory / "grafana/tandem.json": dashboard(),
    }


def main() -> int:
    """Writes them; returns the exit status."""
    for path, text in outputs().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
