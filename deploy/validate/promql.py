"""Which metrics the rules, dashboards and scalers use: their PromQL, parsed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import promql_parser
import yaml

# Grafana's variables, as Prometheus would get them.
_INTERVAL = re.compile(r"\$__rate_interval\b")
_VARIABLE = re.compile(r"\$\w+")
_LABEL_VALUES = re.compile(r"label_values\((\w[\w:]*),")
_UNITS = ("_bucket", "_sum", "_count")
# Prometheus makes it for every target.
BUILT_IN = frozenset({"up"})


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and where it stands: the file, and what it is called there."""

    path: str
    name: str
    text: str


def queries(root: Path) -> list[Query]:
    """Every expression in rules, dashboards and ScaledObjects."""
    return [*_rules(root), *_dashboards(root), *_scalers(root)]


def recorded(root: Path) -> set[str]:
    """The series that recording rules make."""
    return {rule["record"] for _, rule in _all_rules(root) if "record" in rule}


def selectors(query: Query) -> list[promql_parser.VectorSelector]:
    """The expression's selectors. Raises ValueError."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: object) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)
        return True

    text = _VARIABLE.sub(".*", _INTERVAL.sub("5m", query.text))
    promql_parser.walk(promql_parser.parse(text), visit)
    return found


def metric_names(query: Query) -> set[str]:
    """The series that the expression asks for. Raises ValueError."""
    found = {selector.name for selector in selectors(query) if selector.name}
    return found


def family(name: str) -> str:
    """A histogram's name for its series."""
    for unit in _UNITS:
        if name.endswith(unit):
            return name.removesuffix(unit)
    return name


def _all_rules(root: Path) -> Iterator[tuple[str, dict[str, str]]]:
    for path in sorted((root / "deploy/monitoring/rules").glob("*.yml")):
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            for rule in group["rules"]:
                yield str(path.relative_to(root)), rule


def _rules(root: Path) -> Iterator[Query]:
    for path, rule in _all_rules(root):
        yield Query(path, rule.get("record") or rule["alert"], rule["expr"])


def _dashboards(root: Path) -> Iterator[Query]:
    for path in sorted((root / "deploy/monitoring/grafana").glob("*.json")):
        name, board = str(path.relative_to(root)), json.loads(path.read_text(encoding="utf-8"))
        for panel in board["panels"]:
            for target in panel.get("targets", []):
                yield Query(name, panel["title"], target["expr"])
        for variable in board["templating"]["list"]:
            if variable["type"] == "query" and (match := _LABEL_VALUES.match(variable["query"]["query"])):
                yield Query(name, f"variable {variable['name']}", match[1])


def _scalers(root: Path) -> Iterator[Query]:
    for path in sorted((root / "deploy/kustomize").rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if isinstance(document, dict) and document.get("kind") == "ScaledObject":
                for trigger in document["spec"]["triggers"]:
                    yield Query(str(path.relative_to(root)), trigger["name"], trigger["metadata"]["query"])
