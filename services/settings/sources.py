"""Reads settings from a YAML or TOML file, and from the environment."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.settings.declare import ENVIRONMENT_PREFIX, Setting, SettingsError, closest, names_of_all_services
from services.settings.values import convert
from services.settings.vllm_flags import Foreign, is_foreign

CONFIG_VARIABLE = "TANDEM_CONFIG"
"""Names the file, as --config does."""
RESERVED_VARIABLES = frozenset({CONFIG_VARIABLE, "TANDEM_LAUNCHER"})
"""Variables of ours that are not settings."""

# What Kubernetes puts into every pod for a Service named `tandem` or `tandem-…`. TANDEM_PORT=tcp://… is one of them.
_SERVICE_LINK = re.compile(
    r"TANDEM_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
_SERVICE_LINK_PORT = re.compile(r"(tcp|udp|sctp)://")


@dataclass(frozen=True)
class Given:
    """A value that somebody gave, and where: `--port`, `environment variable TANDEM_PORT`, `up.yaml: port`."""

    value: object
    source: str


def from_file(items: Mapping[str, Setting], path: str) -> tuple[dict[str, Given], list[Foreign]]:
    """The settings in a file, and its flags of vLLM's; keys in kebab or snake case. Raises SettingsError."""
    found: dict[str, Given] = {}
    foreign: list[Foreign] = []
    for key, value in read_config_file(path).items():
        name, source = key.replace("-", "_"), f"{path}: {key}"
        if name in found:
            raise SettingsError(f"{source} is there twice", name)
        if name in items:
            found[name] = Given(convert(items[name], value, source), source)
        elif is_foreign(flag := "--" + name.replace("_", "-")):
            foreign.append(_foreign(flag, value, source))
        elif name not in names_of_all_services():
            near = closest(name, items)
            hint = f"; did you mean {near.replace('_', '-')}?" if near else ""
            raise SettingsError(f"{source} is not a setting{hint}")
    return found, foreign


def _foreign(flag: str, value: object, source: str) -> Foreign:
    """A flag of vLLM's with the value that a file gives it; true and false are those of a switch."""
    if isinstance(value, bool):
        return Foreign(flag if value else flag.replace("--", "--no-", 1), (), source)
    members = value if isinstance(value, list) else [value]
    words = (json.dumps(each) if isinstance(each, dict) else str(each) for each in members)
    return Foreign(flag, tuple(words), source)


def from_environment(items: Mapping[str, Setting], environ: Mapping[str, str]) -> dict[str, Given]:
    """The settings in the environment. Raises SettingsError.

    Empty variables count as not set: that is how compose files and manifests leave one out. Members of a tuple are
    separated by commas.
    """
    found: dict[str, Given] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in RESERVED_VARIABLES or not text:
            continue
        if variable.endswith("_PORT") and _SERVICE_LINK_PORT.match(text):
            continue
        name, source = variable.removeprefix(ENVIRONMENT_PREFIX).lower(), f"environment variable {variable}"
        if name in items:
            found[name] = Given(convert(items[name], text, source, split_commas=True), source)
        elif name not in names_of_all_services() and not _SERVICE_LINK.fullmatch(variable):
            near = closest(name, items)
            hint = f"; did you mean {items[near].variable}?" if near else ""
            raise SettingsError(f"{source} is not a setting{hint}")
    return found


def read_config_file(path: str) -> dict[str, object]:
    """The mapping in a YAML (`.yaml`, `.yml`) or TOML (`.toml`) file. Raises SettingsError."""
    if not path.endswith((".yaml", ".yml", ".toml")):
        raise SettingsError(f"--config {path}: the name must end in .yaml, .yml or .toml")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: {error}") from error
    content = _read_toml(path, text) if path.endswith(".toml") else _read_yaml(path, text)
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"{path}: expected one setting per line, as in `max-num-seqs: 8`")
    return content


def _read_toml(path: str, text: str) -> object:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: {error}") from error


def _read_yaml(path: str, text: str) -> object:
    import yaml  # with a YAML file only: --help stays quick

    try:
        document = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(document, yaml.MappingNode):
            keys = [key.value for key, _ in document.value]
            for key in keys:
                if keys.count(key) > 1:  # the reader below would silently take the last
                    raise SettingsError(f"{path}: {key} is there twice")
        content: object = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: {error}") from error
    return content
