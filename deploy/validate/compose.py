"""The compose file: its schema, what it refers to, and the settings that it gives; and what its Prometheus scrapes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from deploy.validate.environment import complaints, role_of_image
from deploy.validate.schemas import load_schema, violations
from deploy.validate.tools import run_tool

_VARIABLE = re.compile(r"\$\{\w+:-([^}]*)\}")
_NEEDED = re.compile(r"\$\{\w+:\?[^}]*\}")
_COMPOSE = "deploy/compose/compose.yaml"
_PROMETHEUS = "deploy/compose/prometheus.yml"
# What every container of ours has, and so every one that comes with it.
_PROMISES = ("read_only", "cap_drop", "security_opt", "deploy")


def check_compose(root: Path) -> Iterator[str]:
    """One line per problem, with the file's name."""
    try:
        document = yaml.safe_load((root / _COMPOSE).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        yield f"{_COMPOSE}: {error}"
        return
    found = list(violations(document, get_builtin_schema("vendor.compose-spec")))
    yield from (f"{_COMPOSE}: {line}" for line in found)
    if found:
        return
    for name, service in document["services"].items():
        yield from (f"{_COMPOSE}: {name}: {line}" for line in _service(root, document, service))
    yield from _prometheus(root, set(document["services"]))
    for name in ("datasource", "dashboards"):
        path = f"deploy/compose/grafana/{name}.yaml"
        loaded = yaml.safe_load((root / path).read_text(encoding="utf-8"))
        yield from (f"{path}: {line}" for line in violations(loaded, load_schema(f"grafana-{name}")))


def _service(root: Path, document: dict[str, Any], service: dict[str, Any]) -> Iterator[str]:
    for promise in _PROMISES:
        if not service.get(promise):
            yield f"has no {promise}"
    if "limits" not in service.get("deploy", {}).get("resources", {}):
        yield "has no resource limits"
    directory = (root / _COMPOSE).parent
    for needed in service.get("depends_on", {}):
        if needed not in document["services"]:
            yield f"depends_on: there is no service {needed}"
    for volume in service.get("volumes", []):
        source = _default(volume).split(":")[0]
        if source.startswith("."):
            if not (directory / source).exists():
                yield f"volumes: {source} does not exist"
        elif source not in document["volumes"]:
            yield f"volumes: {source} is not among the file's volumes"
    role = role_of_image(service["image"])
    if role is None:
        if "healthcheck" not in service:
            yield "has no healthcheck"
        return
    if not (directory / service["build"]["context"] / service["build"]["dockerfile"]).exists():
        yield f"build: {service['build']['dockerfile']} does not exist"
    environ = {key: _default(str(value)) for key, value in service["environment"].items()}
    yield from complaints(root, role, environ)


def _default(text: str) -> str:
    """The text with every `${NAME:-default}` at its default, and some value for every `${NAME:?why}`."""
    return _NEEDED.sub("given", _VARIABLE.sub(r"\1", text))


def _prometheus(root: Path, services: set[str]) -> Iterator[str]:
    ok, output, errors = run_tool("promtool", ["check", "config", "--syntax-only", _PROMETHEUS], root)
    if not ok:
        yield f"{_PROMETHEUS}: {' '.join((output + errors).split())}"
        return
    document = yaml.safe_load((root / _PROMETHEUS).read_text(encoding="utf-8"))
    for job in document["scrape_configs"]:
        for target in (target for group in job["static_configs"] for target in group["targets"]):
            if target.partition(":")[0] not in services:
                yield f"{_PROMETHEUS}: {job['job_name']}: {target} is no service of {_COMPOSE}"
