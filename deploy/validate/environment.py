"""The settings that a deployment gives to a service by its environment, read as the service itself reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from deploy.validate.dockerfile import parse
from services.decode.config import DecodeConfig
from services.elastic.config import ElasticConfig
from services.prefill.config import PrefillConfig
from services.router.config import RouterConfig
from services.settings import tensor_parallel_size
from services.settings.declare import SettingsClass, SettingsError
from services.settings.load import resolve_settings
from services.store.config import StoreConfig
from services.worker.config import WorkerConfig

CONFIGS: Mapping[str, type[SettingsClass]] = {
    "router": RouterConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
    "elastic": ElasticConfig,
    "store": StoreConfig,
}

# Roles that are targets of one Dockerfile, whose layers they share.
WORKERS = ("prefill", "decode", "elastic")


def role_of_image(image: str) -> str | None:
    """`registry.example.com/tandem-router:cpu` is the router's."""
    name = image.rsplit("/", 1)[-1].partition(":")[0]
    role = name.removeprefix("tandem-")
    return role if name != role and role in CONFIGS else None


def dockerfile_of_image(root: Path, image: str) -> Path:
    """`tandem-prefill:vllm` is made by `worker-vllm.Dockerfile`; other tags of workers by `worker.Dockerfile`."""
    role, tag = role_of_image(image) or "", image.rsplit("/", 1)[-1].partition(":")[2]
    name = role if role not in WORKERS else "worker-vllm" if tag == "vllm" else "worker"
    return root / f"deploy/docker/{name}.Dockerfile"


def target_of(role: str) -> str | None:
    """The stage of its Dockerfile that is a role's image; None: the last."""
    return role if role in WORKERS else None


def image_environment(root: Path, image: str) -> dict[str, str]:
    """The variables that its Dockerfile sets in the image."""
    dockerfile = parse(dockerfile_of_image(root, image).read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for stage in dockerfile.chain(target_of(role_of_image(image) or ""), {}):
        for instruction in stage.instructions:
            if instruction.keyword == "ENV":
                found |= dict(word.split("=", 1) for word in instruction.words)
    return found


def complaints(root: Path, image: str, environ: Mapping[str, str]) -> Iterator[str]:
    """What the service of an image of ours would refuse to start with, in its own words."""
    role = role_of_image(image)
    assert role is not None, f"{image} is none of ours"
    try:
        config = resolve_settings(CONFIGS[role], [], {**image_environment(root, image), **environ})
    except SettingsError as error:
        yield f"{role}: {error}"
        return
    if isinstance(config, WorkerConfig) and config.device != "cpu" and config.kv_transport == "nixl":
        num_ranks = tensor_parallel_size(config.engine_args)
        if num_ranks > 1:
            yield f"{role}: TANDEM_KV_TRANSPORT=nixl: GPU memory of {num_ranks} ranks is not to be shown on; give auto"
