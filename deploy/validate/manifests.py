"""The Kubernetes manifests as kustomize renders them: schemas with strict fields, references, and settings."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from deploy.validate.environment import complaints, role_of_image
from deploy.validate.schemas import load_schema, violations
from deploy.validate.tools import run_kustomize

Manifest = dict[str, Any]

KUBERNETES_VERSION = "1.32.0"
_KUBERNETES_SCHEMAS = files("kubernetes_validate") / f"kubernetes-json-schema/v{KUBERNETES_VERSION}-local-strict"
_OVERLAYS = "deploy/kustomize/overlays"
# Kinds of operators: Kubernetes' own schemas do not have them.
_CUSTOM = frozenset({"ScaledObject", "ServiceMonitor", "PodMonitor", "PrometheusRule"})
_POD_OWNERS = frozenset({"Deployment", "StatefulSet"})


def check_manifests(root: Path) -> Iterator[str]:
    """One line per problem, with the overlay's name, and the manifest's."""
    for directory in sorted((root / _OVERLAYS).iterdir()):
        name = str(directory.relative_to(root))
        ok, output, errors = run_kustomize(name, root)
        if not ok:
            yield f"{name}: {' '.join(errors.split())}"
            continue
        manifests = [document for document in yaml.safe_load_all(output) if document]
        for manifest in manifests:
            yield from (f"{name}: {label(manifest)}: {line}" for line in _schema(manifest))
        # References only of what has the right form.
        yield from (f"{name}: {line}" for line in _references(manifests))
        yield from (f"{name}: {line}" for line in _settings(root, manifests))


def label(manifest: Manifest) -> str:
    """`Deployment tandem-router`."""
    return f"{manifest.get('kind')} {manifest.get('metadata', {}).get('name')}"


def _schema(manifest: Manifest) -> Iterator[str]:
    if manifest.get("kind") in _CUSTOM:
        yield from violations(manifest, load_schema(str(manifest["kind"]).lower()))
        return
    try:
        validator = _validator(str(manifest.get("apiVersion")), str(manifest.get("kind")))
    except FileNotFoundError:
        yield f"Kubernetes {KUBERNETES_VERSION} has no {manifest.get('apiVersion')} {manifest.get('kind')}"
        return
    yield from violations(manifest, validator)


@functools.cache
def _validator(api_version: str, kind: str) -> Draft202012Validator:
    """Of a kind of Kubernetes' own, with strict fields; the schemas are those that kubernetes-validate carries."""
    group, _, version = api_version.rpartition("/")
    name = "-".join([kind.lower(), *([group.partition(".")[0]] if group else []), version])
    schema = json.loads((_KUBERNETES_SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    return Draft202012Validator(schema, registry=_definitions())


@functools.cache
def _definitions() -> Registry[Any]:
    contents = json.loads((_KUBERNETES_SCHEMAS / "_definitions.json").read_text(encoding="utf-8"))
    return Resource.from_contents(contents) @ Registry()


def _pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Pod templates by their owner's label."""
    return {label(item): item["spec"]["template"] for item in manifests if item["kind"] in _POD_OWNERS}


def _references(manifests: list[Manifest]) -> Iterator[str]:
    """What the API server would take, and what would then never work."""
    pods = _pods(manifests)
    for name, pod in pods.items():
        yield from (f"{name}: {line}" for line in _pod_references(pod, manifests))
    names = {label(item) for item in manifests}
    for item in manifests:
        if (target := item.get("spec", {}).get("scaleTargetRef")) is not None:
            wanted = f"{target.get('kind', 'Deployment')} {target['name']}"
            if wanted not in names:
                yield f"{label(item)}: scaleTargetRef: there is no {wanted}"
        for selector in _selectors(item):
            matched = [pod for pod in pods.values() if _matches(selector, pod["metadata"]["labels"])]
            if not matched:
                yield f"{label(item)}: its selector {selector} matches no pod"
            ports = {port["name"] for pod in matched for box in pod["spec"]["containers"] for port in box["ports"]}
            for port in _named_ports(item):
                if matched and port not in ports:
                    yield f"{label(item)}: the pods that it selects have no port {port}"


def _pod_references(pod: Manifest, manifests: list[Manifest]) -> Iterator[str]:
    names = {label(item) for item in manifests}
    volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
    volumes |= {
        claim["metadata"]["name"]
        for item in manifests
        for claim in item.get("spec", {}).get("volumeClaimTemplates", [])
    }
    for container in pod["spec"]["containers"]:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"there is no volume {mount['name']}"
        for source in container.get("envFrom", []):
            if f"ConfigMap {source['configMapRef']['name']}" not in names:
                yield f"there is no ConfigMap {source['configMapRef']['name']}"
        ports = {port["name"] for port in container["ports"]} | {port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            for check in container.get(probe, {}).values():
                if isinstance(check, dict) and "port" in check and check["port"] not in ports:
                    yield f"{probe}: the container has no port {check['port']}"
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield "readOnlyRootFilesystem is not true"
    for volume in pod["spec"].get("volumes", []):
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and f"PersistentVolumeClaim {claim}" not in names:
            yield f"there is no PersistentVolumeClaim {claim}"


def _selectors(item: Manifest) -> Iterator[Mapping[str, Any]]:
    """The label selectors by which a manifest finds pods."""
    spec = item.get("spec", {})
    if item["kind"] == "Service":
        yield {"matchLabels": spec["selector"]}
    elif item["kind"] == "NetworkPolicy":
        yield spec["podSelector"]
    elif item["kind"] in {"PodDisruptionBudget", "ServiceMonitor", "PodMonitor"}:
        # A ServiceMonitor selects Services; ours have the labels of their pods.
        yield spec["selector"]


def _named_ports(item: Manifest) -> Iterator[str]:
    spec = item["spec"]
    ports = [port.get("targetPort", port["port"]) for port in spec.get("ports", [])]
    ports += [port["port"] for rule in spec.get("ingress", []) for port in rule.get("ports", [])]
    ports += [end["port"] for end in [*spec.get("endpoints", []), *spec.get("podMetricsEndpoints", [])]]
    yield from (port for port in ports if isinstance(port, str))


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        if expression["operator"] != "In":
            raise ValueError(f"this check knows no selector operator {expression['operator']}")
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def _settings(root: Path, manifests: list[Manifest]) -> Iterator[str]:
    data = {item["metadata"]["name"]: item.get("data", {}) for item in manifests if item["kind"] == "ConfigMap"}
    for name, pod in _pods(manifests).items():
        for container in pod["spec"]["containers"]:
            if role_of_image(container["image"]) is None:
                continue
            environ: dict[str, str] = {}
            for source in container.get("envFrom", []):
                environ |= data.get(source["configMapRef"]["name"], {})
            # What comes from the pod or from a secret has some value.
            environ |= {item["name"]: item.get("value", "given") for item in container.get("env", [])}
            yield from (f"{name}: {line}" for line in complaints(root, container["image"], environ))
            drain_s = float(environ.get("TANDEM_DRAIN_TIMEOUT_S") or environ.get("TANDEM_SHUTDOWN_TIMEOUT_S") or 30)
            if pod["spec"]["terminationGracePeriodSeconds"] <= drain_s:
                yield f"{name}: terminationGracePeriodSeconds leaves no time to drain for {drain_s:g} s"
            # Readiness is progress: gRPC's own word, or an open port, says less.
            if container.get("readinessProbe", {}).get("httpGet", {}).get("path") != "/ready":
                yield f"{name}: readinessProbe does not ask for /ready"
