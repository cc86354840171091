"""LoRA adapters, as `--lora-modules` names them: PEFT's files, told apart by name and by content.

An adapter's *key* is its name and a fingerprint of its files. Orders name it by the key, and block hashes start from it
(`kvstore.block.namespace`): so workers that have other files under one name neither serve each other's requests nor
share a block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.settings import SettingsError

_CONFIG: Final = "adapter_config.json"
_WEIGHTS: Final = "adapter_model.safetensors"
_SETTING: Final = "lora_modules"


@dataclass(frozen=True)
class Adapter:
    """One adapter of a worker's."""

    name: str
    directory: Path
    fingerprint: str

    @property
    def key(self) -> str:
        return f"{self.name}:{self.fingerprint}"


def parse_modules(modules: Sequence[str]) -> dict[str, str]:
    """Return directories by adapter's name, of modules as `vllm serve` takes them: `name=path`, or a JSON object.

    Raises `SettingsError`.
    """
    found: dict[str, str] = {}
    for module in modules:
        name, path = _from_json(module) if module.lstrip().startswith("{") else module.partition("=")[::2]
        if not name or not path:
            raise SettingsError(f'{module!r} is neither name=path nor {{"name": …, "path": …}}', _SETTING)
        if name in found:
            raise SettingsError(f"{name} is named twice", _SETTING)
        found[name] = path
    return found


def _from_json(module: str) -> tuple[str, str]:
    try:
        said = json.loads(module)
    except ValueError as error:
        raise SettingsError(f"{module!r} is no JSON: {error}", _SETTING) from error
    unknown = sorted(set(said) - {"name", "path", "base_model_name"})
    if unknown:
        raise SettingsError(f"{module!r} says {', '.join(unknown)}; there are name, path, base_model_name", _SETTING)
    return str(said.get("name", "")), str(said.get("path", ""))


def read_adapters(modules: Sequence[str]) -> tuple[Adapter, ...]:
    """Find the files of each, and read them for their fingerprint. Raises `SettingsError`."""
    return tuple(_read(name, Path(path).expanduser()) for name, path in parse_modules(modules).items())


def _read(name: str, directory: Path) -> Adapter:
    digest = hashlib.blake2b(digest_size=8, person=b"tandem.adapter")
    for file in (directory / _CONFIG, directory / _WEIGHTS):
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).digest())
        except OSError as error:
            raise SettingsError(
                f"{name}: an adapter is a directory with {_CONFIG} and {_WEIGHTS}, as PEFT writes it, and {file} cannot"
                f" be read: {error.strerror}",
                _SETTING,
            ) from error
    return Adapter(name, directory, digest.hexdigest())
