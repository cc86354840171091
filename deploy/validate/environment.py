"""The settings that a deployment gives to a service by its environment, read as the service itself reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from deploy.validate.dockerfile import parse
from services.decode.config import DecodeConfig
from services.prefill.config import PrefillConfig
from services.router.config import RouterConfig
from services.settings.declare import SettingsClass, SettingsError
from services.settings.load import resolve_settings
from services.store.config import StoreConfig

CONFIGS: Mapping[str, type[SettingsClass]] = {
    "router": RouterConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
    "store": StoreConfig,
}


def role_of_image(image: str) -> str | None:
    """`registry.example.com/tandem-router:cpu` is the router's."""
    name = image.rsplit("/", 1)[-1].partition(":")[0]
    role = name.removeprefix("tandem-")
    return role if name != role and role in CONFIGS else None


def image_environment(root: Path, role: str) -> dict[str, str]:
    """The variables that the role's Dockerfile sets in the image."""
    dockerfile = parse((root / f"deploy/docker/{role}.Dockerfile").read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for stage in dockerfile.chain(None, {}):
        for instruction in stage.instructions:
            if instruction.keyword == "ENV":
                found |= dict(word.split("=", 1) for word in instruction.words)
    return found


def complaints(root: Path, role: str, environ: Mapping[str, str]) -> Iterator[str]:
    """What the service would refuse to start with, in its own words."""
    try:
        resolve_settings(CONFIGS[role], [], {**image_environment(root, role), **environ})
    except SettingsError as error:
        yield f"{role}: {error}"
