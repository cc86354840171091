"""The compose files: schema, what they refer to, the settings that they give; and what their Prometheus scrapes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

from deploy.validate.environment import CONFIGS, complaints, dockerfile_of_image, role_of_image, target_of
from deploy.validate.schemas import load_schema, violations
from deploy.validate.tools import run_tool
from services.settings.declare import settings_of
from services.settings.sources import CONFIG_VARIABLE

_VARIABLE = re.compile(r"\$\{\w+:-([^}]*)\}")
_NEEDED = re.compile(r"\$\{\w+:\?[^}]*\}")
_SECRET = re.compile(r"/run/secrets/([\w.-]+)")
_COMPOSE = "deploy/compose/compose.yaml"
# What is laid over it: `docker compose -f compose.yaml -f vllm.yaml`.
_OVERRIDES = ("deploy/compose/vllm.yaml", "deploy/compose/elastic.yaml")
_PROMETHEUS = "deploy/compose/prometheus.yml"
# What every container of ours has, and so every one that comes with it.
_PROMISES = ("read_only", "cap_drop", "security_opt", "deploy")


def check_compose(root: Path) -> Iterator[str]:
    """One line per problem, with the file's name."""
    documents = {}
    for path in (_COMPOSE, *_OVERRIDES):
        try:
            document = yaml.safe_load((root / path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            yield f"{path}: {error}"
            return
        found = list(violations(document, get_builtin_schema("vendor.compose-spec")))
        yield from (f"{path}: {line}" for line in found)
        if found:
            return
        documents[path] = document
    document = documents.pop(_COMPOSE)
    for name, service in document["services"].items():
        yield from (f"{_COMPOSE}: {name}: {line}" for line in _service(root, document, service))
    for path, override in documents.items():
        unknown = override["services"].keys() - document["services"].keys()
        if unknown:
            yield f"{path}: there is no service {', '.join(sorted(unknown))}"
            continue
        whole = _merged(document, override)
        for name in override["services"]:
            yield from (f"{path}: {name}: {line}" for line in _service(root, whole, whole["services"][name]))
    yield from _prometheus(root, set(document["services"]))
    for name in ("datasource", "dashboards"):
        path = f"deploy/compose/grafana/{name}.yaml"
        loaded = yaml.safe_load((root / path).read_text(encoding="utf-8"))
        yield from (f"{path}: {line}" for line in violations(loaded, load_schema(f"grafana-{name}")))


def _merged(below: Any, above: Any) -> Any:
    """As Docker lays one file over another: mappings are joined, lists are added up, the rest is replaced."""
    if isinstance(below, dict) and isinstance(above, dict):
        both = {key: _merged(below[key], above[key]) for key in below.keys() & above.keys()}
        return {**below, **above, **both}
    return [*below, *above] if isinstance(below, list) and isinstance(above, list) else above


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
    yield from _secrets(document, service)
    for port in service.get("ports", []):
        if not _default(port).startswith("127.0.0.1:"):
            yield f"ports: {port} is open to other machines by default"
    for network in service.get("networks", []):
        if network not in document["networks"]:
            yield f"networks: there is no network {network}"
    role = role_of_image(service["image"])
    if role is None:
        if "healthcheck" not in service:
            yield "has no healthcheck"
        return
    if not (directory / service["build"]["context"] / service["build"]["dockerfile"]).exists():
        yield f"build: {service['build']['dockerfile']} does not exist"
    dockerfile = dockerfile_of_image(root, service["image"])
    if dockerfile.name != Path(service["build"]["dockerfile"]).name:
        yield f"build: {service['image']} is made by {dockerfile.name}"
        return
    if service["build"].get("target") != target_of(role):
        yield f"build: the target is not {target_of(role)}"
    environ = {key: _default(str(value)) for key, value in service["environment"].items()}
    environ.pop(CONFIG_VARIABLE, None)  # a secret, which is not here
    for item in settings_of(CONFIGS[role]):
        if item.secret and item.variable in environ:
            yield f"environment: {item.variable} is a secret, which the environment shows: give it as a file"
    if role == "router" and "TANDEM_API_KEY_FILE" not in environ:
        yield "environment: without TANDEM_API_KEY_FILE everybody may ask"
    yield from complaints(root, service["image"], environ)


def _secrets(document: dict[str, Any], service: dict[str, Any]) -> Iterator[str]:
    """What a service reads of its secrets, and what it is given, are the same."""
    said = [*service.get("environment", {}).values(), *service.get("command", ())]
    said += service.get("healthcheck", {}).get("test", ())
    read = {name for text in said for name in _SECRET.findall(str(text))}
    given = set(service.get("secrets", []))
    for name in sorted(read - given):
        yield f"reads /run/secrets/{name}, which is not among its secrets"
    for name in sorted(given - read):
        yield f"secrets: it does not read {name}"
    for name in sorted(given - set(document["secrets"])):
        yield f"secrets: {name} is not among the file's secrets"
    if given and not service.get("group_add"):
        yield "has secrets, and no group_add: it cannot read their files"


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
