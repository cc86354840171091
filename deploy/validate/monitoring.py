"""Rules, their unit tests, the dashboard, and every PromQL expression that stands anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from deploy.monitoring.render import outputs
from deploy.validate.promql import BUILT_IN, family, metric_names, queries, recorded
from deploy.validate.schemas import load_schema, violations
from deploy.validate.tools import run_tool

_RULES = "deploy/monitoring/rules"
_RULE_TESTS = "deploy/monitoring/tests"
_METRICS_PAGE = "docs/metrics.md"
_RUNBOOK = "docs/operations.md"
_ROW = re.compile(r"^\| `([\w:]+)` \| (gauge|counter|histogram) \|", re.MULTILINE)
_HEADING = re.compile(r"^#+ (\w+)$", re.MULTILINE)


def check_monitoring(root: Path) -> Iterator[str]:
    """One line per problem, with the file's name."""
    broken = False
    for path in sorted((root / _RULES).glob("*.yml")):
        name = str(path.relative_to(root))
        ok, output, errors = run_tool("promtool", ["check", "rules", name], root)
        if not ok:
            broken = True
            yield f"{name}: {' '.join((output + errors).split())}"
    if broken:  # whatever else there is to say would say it again
        return
    yield from _untested(root)
    yield from _runbook(root)
    yield from _rendered(root)
    yield from check_queries(root)
    for path in sorted((root / _RULE_TESTS).glob("*.yml")):  # which takes longer than all the rest
        name = str(path.relative_to(root))
        ok, output, errors = run_tool("promtool", ["test", "rules", name], root)
        if not ok:
            yield f"{name}: {' '.join((output + errors).split())}"


def check_queries(root: Path) -> Iterator[str]:
    """Every expression parses, and asks for series that there are: those that docs/metrics.md lists."""
    known = documented(root) | recorded(root) | BUILT_IN
    for query in queries(root):
        try:
            names = metric_names(query)
        except ValueError as error:
            yield f"{query.path}: {query.name}: {error}"
            continue
        for name in sorted(names):
            if name not in known and family(name) not in known:
                yield f"{query.path}: {query.name}: there is no metric {name} in {_METRICS_PAGE}"


def documented(root: Path) -> set[str]:
    """The metrics of the metrics page, which a test compares with what a running stack exports."""
    return {match[1] for match in _ROW.finditer((root / _METRICS_PAGE).read_text(encoding="utf-8"))}


def alerts(root: Path) -> list[str]:
    """Their names."""
    return [query.name for query in queries(root) if query.path == f"{_RULES}/alerts.yml"]


def _untested(root: Path) -> Iterator[str]:
    tests = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((root / _RULE_TESTS).glob("*.yml"))]
    checks = [check for file in tests for test in file["tests"] for check in test.get("alert_rule_test", [])]
    fired = {check["alertname"] for check in checks if check["exp_alerts"]}
    for alert in alerts(root):
        if alert not in fired:
            yield f"{_RULE_TESTS}: no test in which {alert} fires"


def _runbook(root: Path) -> Iterator[str]:
    headings = set(_HEADING.findall((root / _RUNBOOK).read_text(encoding="utf-8")))
    for alert in alerts(root):
        if alert not in headings:
            yield f"{_RUNBOOK}: has no section {alert}"


def _rendered(root: Path) -> Iterator[str]:
    for path, text in outputs(root / "deploy/monitoring").items():
        name = str(path.relative_to(root))
        if path.read_text(encoding="utf-8") != text:
            yield f"{name}: is not what deploy/monitoring/render.py gives: `make render-deploy`"
    board = "deploy/monitoring/grafana/tandem.json"
    document = json.loads((root / board).read_text(encoding="utf-8"))
    yield from (f"{board}: {line}" for line in violations(document, load_schema("dashboard")))
