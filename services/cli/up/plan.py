"""Plans the processes that `tandem up` starts from its settings: who, with which flags, where. No I/O.

The other processes' settings are not declared again: `up` takes the declarations from their config classes, and passes
on what was given. What the launcher decides itself (addresses, names, the registry) it does not take.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from services.cli.config import UpConfig
from services.cli.up.placement import Placement
from services.cli.up.spec import ChildSpec, Stack
from services.decode.config import DecodeConfig
from services.elastic.config import ElasticConfig
from services.logs import LAUNCHER_VARIABLE
from services.prefill.config import PrefillConfig
from services.router.config import RouterConfig
from services.router.tenants import ApiKey
from services.settings import (
    ENVIRONMENT_PREFIX,
    Given,
    Setting,
    SettingsError,
    argv_of,
    build_settings,
    secret_environment,
    settings_of,
    tensor_parallel_size,
)
from services.store.config import StoreConfig
from services.worker.config import WorkerConfig

_DECIDED_HERE = frozenset({"redis", "worker_id", "router_id", "role", "colocated", "log_format"})
_WORKER_ADDRESSES = frozenset({"host", "port", "kv_port", "http_port", "advertise_host"})
_EXTRA_GRACE_S = 5.0
_THREADS = "OMP_NUM_THREADS"
"""OpenMP's own variable, which every library that computes reads."""
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Keeps `python -m` from looking for packages in the working directory, which may have a `services` of its own."""


_CONFIGS: Final[Mapping[str, type[WorkerConfig]]] = {
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
    "elastic": ElasticConfig,
}


class _Member(NamedTuple):
    """A worker: its name, the service that it runs, and what it does first."""

    name: str
    service: str
    role: str


def router_settings() -> list[Setting]:
    """The router's settings that `up` passes on."""
    items = [item for item in settings_of(RouterConfig) if item.name not in _DECIDED_HERE]
    # Workers are here the stack's: who asks for some by this name would get processes of the router.
    return [replace(item, flags=tuple(flag for flag in item.flags if flag != "--workers")) for item in items]


def worker_settings(cls: type[WorkerConfig]) -> list[Setting]:
    """The workers' settings that `up` passes on."""
    return [item for item in settings_of(cls) if item.name not in _DECIDED_HERE | _WORKER_ADDRESSES]


def store_settings() -> list[Setting]:
    """The store nodes' settings that `up` passes on."""
    return [item for item in settings_of(StoreConfig) if item.name not in _DECIDED_HERE | _WORKER_ADDRESSES]


def up_settings() -> list[Setting]:
    """Everything that `tandem up` accepts, for its parser: its own, the router's, the workers', the store nodes'."""
    own, router = list(settings_of(UpConfig)), router_settings()
    workers = {item.name: item for cls in (PrefillConfig, DecodeConfig, ElasticConfig) for item in worker_settings(cls)}
    in_router = {item.name for item in router}
    items = {item.name: item for item in own}
    for item in workers.values():
        items.setdefault(item.name, replace(item, group="router and workers" if item.name in in_router else "workers"))
    for item in router:
        items.setdefault(item.name, replace(item, group=f"router: {item.group}"))
    for item in store_settings():
        items.setdefault(item.name, replace(item, group="store nodes"))
    return list(items.values())


def store_config(given: Mapping[str, Given]) -> StoreConfig:
    """The store nodes' configuration. Raises SettingsError."""
    return build_settings(StoreConfig, _only(given, store_settings()))


def up_config(given: Mapping[str, Given]) -> UpConfig:
    """The launcher's own settings, `prefill` and `decode` being all workers, also where --workers counts them. Raises
    SettingsError.
    """
    config = build_settings(UpConfig, given)
    if not config.workers:
        return config
    number, given_number = config.workers, config.prefill + config.decode
    if "prefill" in given and "decode" in given and given_number != number:
        raise SettingsError(
            f"--workers: {number} is not what --prefill and --decode come to, {given_number}", "workers"
        )
    prefill = config.prefill if "prefill" in given else number // 2
    decode = config.decode if "decode" in given else number - prefill
    prefill = number - decode
    if prefill < 0 or decode < 1:
        raise SettingsError(f"--workers: {number} is too few: at least one worker begins to decode", "workers")
    return replace(config, prefill=prefill, decode=decode)


def check_forwarded(
    given: Mapping[str, Given], model: str, is_elastic: bool = False
) -> tuple[RouterConfig, PrefillConfig, DecodeConfig, StoreConfig]:
    """The configurations that the processes will make of `given`, so that a mistake shows before anything starts.

    Of an elastic fleet's workers there is one for both roles. Raises SettingsError.
    """
    router = build_settings(RouterConfig, _only(given, router_settings()))
    with_model = dict(given) | {"model": Given(model, "--model")}
    if is_elastic:
        elastic = build_settings(ElasticConfig, _only(with_model, worker_settings(ElasticConfig)))
        return router, elastic, elastic, store_config(given)
    prefill = build_settings(PrefillConfig, _only(with_model, worker_settings(PrefillConfig)))
    decode = build_settings(DecodeConfig, _only(with_model, worker_settings(DecodeConfig)))
    return router, prefill, decode, store_config(given)


def check_offloading(config: UpConfig, worker: WorkerConfig, available_bytes: int) -> None:
    """Refuse a host tier that the workers of this machine have no memory for between them: each looks for itself only.

    `available_bytes` 0: not known. Raises SettingsError.
    """
    wanted_gib = num_workers(config) * worker.kv_offloading_size
    if available_bytes and wanted_gib * 2**30 > available_bytes:
        raise SettingsError(
            f"--kv-offloading-size: {num_workers(config)} workers want {wanted_gib:g} GiB between them,"
            f" and {available_bytes / 2**30:.1f} GiB of memory are available",
            "kv_offloading_size",
        )


def check_stores(config: UpConfig, given: Mapping[str, Given]) -> None:
    """Refuse what is said of store nodes where there are none, and nothing would be kept. Raises SettingsError."""
    for item in store_settings():
        if item.name.startswith("store_") and item.name in given and not config.stores:
            raise SettingsError(f"{given[item.name].source}: there is no store node; give --stores 1, too", item.name)


def _only(given: Mapping[str, Given], items: Sequence[Setting]) -> dict[str, Given]:
    return {item.name: given[item.name] for item in items if item.name in given}


def plan_stack(
    config: UpConfig,
    given: Mapping[str, Given],
    *,
    model: str,
    served_model_name: str,
    redis: str,
    port: int,
    placements: Sequence[Placement],
    environ: Mapping[str, str],
    worker_prefix: str = "",
) -> Stack:
    """The processes to start.

    `given` is what the user gave, `port` the free one that the router will take, `placements` one place per worker,
    prefill workers first. `worker_prefix` makes the workers' names unique where the registry is shared with other
    machines. Raises SettingsError.
    """
    router, prefill, decode, store = check_forwarded(given, model, config.elastic)
    members = _members(config)
    assert len(placements) == len(members)
    values = {name: value.value for name, value in given.items()} | {"model": model}
    values.setdefault("served_model_name", (served_model_name,))
    log_flag = f"--log-format={'json' if config.log_format == 'json' else 'text'}"
    base = _base_environment(environ, redis)
    workers = []
    for member, placement in zip(members, placements, strict=True):
        cls = _CONFIGS[member.service]
        own = _placed(values, placement, base)
        argv = [*argv_of(worker_settings(cls), own), f"--worker-id={worker_prefix}{member.name}", log_flag]
        if config.elastic:
            argv.append(f"--role={member.role}")
        elif not config.prefill or config.colocated:
            argv.append("--colocated")
        workers.append(
            ChildSpec(
                name=member.name,
                argv=(sys.executable, "-m", f"services.{member.service}", *argv),
                environ=base | _threads(own) | _gpu(placement) | secret_environment(worker_settings(cls), own),
                cores=placement.cores,
                grace_s=(prefill if member.role == "prefill" else decode).drain_timeout_s + _EXTRA_GRACE_S,
                is_forked=True,
            )
        )
    api_key, router_values = _our_key(router, values | {"port": port})
    return Stack(
        router=ChildSpec(
            name="router",
            argv=(sys.executable, "-m", "services.router", *argv_of(router_settings(), router_values), log_flag),
            environ=base | secret_environment(router_settings(), router_values),
            grace_s=router.shutdown_timeout_s + _EXTRA_GRACE_S,
        ),
        workers=tuple(workers),
        stores=tuple(_store(index, store, values, base, log_flag, worker_prefix) for index in range(config.stores)),
        host=router.host,
        port=port,
        has_tls=bool(router.ssl_certfile),
        served_model_name=(decode.served_model_name or (served_model_name,))[0],
        api_key=api_key,
        worker_prefix=worker_prefix,
        first_prompt_words=_first_prompt_words(decode, any(member.role == "prefill" for member in members)),
    )


def _our_key(router: RouterConfig, values: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """A key for the launcher's own questions, and the router's values, of which it may be one; empty where none is
    needed.
    """
    plain = [key.plain for key in map(ApiKey.parse, router.read_api_keys()) if key.plain]
    if plain or not router.read_api_keys():
        return (plain or [""])[0], dict(values)
    ours = secrets.token_urlsafe(32)  # of the others only the hashes are known
    return ours, {**values, "api_key": (*router.api_key, f"tandem-up:{ours}")}


def _first_prompt_words(decode: DecodeConfig, has_prefill: bool) -> int:
    """Enough for a prompt that a prefill worker computes, where there is one: more than decode workers take on."""
    wanted = decode.local_prefill_max_tokens + decode.block_size if has_prefill else 1
    return min(wanted, decode.max_model_len // 2) if decode.max_model_len else wanted


def _store(
    index: int,
    config: StoreConfig,
    values: Mapping[str, object],
    base: dict[str, str],
    log_flag: str,
    worker_prefix: str,
) -> ChildSpec:
    """One store node. It has no cores of its own: it waits for the network and the disk most of the time."""
    name, own = f"store-{index}", dict(values)
    if config.store_disk_dir:
        own["store_disk_dir"] = str(store_directory(config, index))
    return ChildSpec(
        name=name,
        argv=(
            sys.executable,
            "-m",
            "services.store",
            *argv_of(store_settings(), own),
            f"--worker-id={worker_prefix}{name}",
            log_flag,
        ),
        environ=base | secret_environment(store_settings(), own),
        grace_s=config.drain_timeout_s + _EXTRA_GRACE_S,
    )


def store_directory(config: StoreConfig, index: int) -> Path:
    """A directory for each store node, below the one that the user gave."""
    return Path(config.store_disk_dir).absolute() / f"store-{index}"


def num_workers(config: UpConfig) -> int:
    return len(_members(config))


def process_names(config: UpConfig) -> list[str]:
    """Everybody who may say something, the launcher first."""
    workers = [member.name for member in _members(config)]
    return ["tandem", "redis", "router", *workers, *(f"store-{index}" for index in range(config.stores))]


def _members(config: UpConfig) -> list[_Member]:
    """The workers, those that prefill first."""
    roles = ["prefill"] * (0 if config.colocated else config.prefill) + ["decode"] * config.decode
    if config.elastic:
        return [_Member(f"elastic-{index}", "elastic", role) for index, role in enumerate(roles)]
    return [_Member(f"{role}-{roles[:index].count(role)}", role, role) for index, role in enumerate(roles)]


def _base_environment(environ: Mapping[str, str], redis: str) -> dict[str, str]:
    """The launcher's environment without our settings: those are resolved already, and come as flags.

    TANDEM_PORT, for one, is the router's here, and must not become a worker's. The registry's URL may hold a password,
    so it is not a flag.
    """
    kept = {name: value for name, value in environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    return kept | SAFE_PATH | {LAUNCHER_VARIABLE: "1", "PYTHONUNBUFFERED": "1", "TANDEM_REDIS": redis}


def _placed(values: Mapping[str, object], placement: Placement, environ: Mapping[str, str]) -> dict[str, object]:
    """The values with what follows from the place, where the user did not say otherwise."""
    placed = dict(values)
    if placement.num_threads is not None and not environ.get(_THREADS):
        ranks = tensor_parallel_size(str(values.get("engine_args", "")))
        placed.setdefault("num_threads", max(1, placement.num_threads // ranks))
    if placement.num_others_cores and placed.get("num_threads") == 1 and placement.gpu is None:
        placed.setdefault("helper_threads", 1)
    if placement.gpu_share is not None and placement.gpu_share < 1:
        default = next(item.default for item in settings_of(DecodeConfig) if item.name == "gpu_memory_utilization")
        assert isinstance(default, float)
        placed.setdefault("gpu_memory_utilization", placement.gpu_memory_utilization(default))
    return placed


def _threads(values: Mapping[str, object]) -> dict[str, str]:
    """Sets the size of thread pools that native libraries open before they can be told otherwise."""
    return {_THREADS: str(values["num_threads"])} if values.get("num_threads") else {}


def _gpu(placement: Placement) -> dict[str, str]:
    return {} if placement.gpu is None else {"CUDA_VISIBLE_DEVICES": placement.gpu}
