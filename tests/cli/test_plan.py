"""Which processes `tandem up` starts, with which flags and environment."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path

import pytest

from services.cli.config import UpConfig
from services.cli.up.own_secrets import make_secrets, own_secrets
from services.cli.up.placement import Placement
from services.cli.up.plan import (
    check_offloading,
    check_stores,
    num_workers,
    plan_stack,
    router_settings,
    store_settings,
    up_config,
    up_settings,
    worker_settings,
)
from services.cli.up.spec import ChildSpec, Stack
from services.decode.config import DecodeConfig
from services.elastic.config import ElasticConfig
from services.prefill.config import PrefillConfig
from services.router.config import RouterConfig
from services.settings import (
    Given,
    SettingsError,
    collect_settings,
    make_parser,
)
from services.settings.load import resolve_settings
from services.store.config import StoreConfig
from services.worker.config import WorkerConfig

ENVIRON = {"PATH": os.environ["PATH"], "TANDEM_PORT": "9999", "TANDEM_MAX_NUM_SEQS": "8"}


def plan(
    *argv: str,
    placements: list[Placement] | None = None,
    environ: dict[str, str] | None = None,
    inherited: dict[str, str] | None = None,
) -> Stack:
    given = collect_settings(up_settings(), argv, environ or {}, make_parser(up_settings()))
    config = up_config(given)
    return plan_stack(
        config,
        given,
        model="/models/m",
        served_model_name="m",
        redis="redis://:hunter2@127.0.0.1:7000/0",
        port=8123,
        placements=placements or [Placement()] * num_workers(config),
        environ=ENVIRON | (inherited or {}),
    )


def config_of(spec: ChildSpec, cls: type[WorkerConfig] | type[RouterConfig]) -> object:
    """The settings that the process will make of its flags and environment."""
    return resolve_settings(cls, spec.argv[3:], {k: v for k, v in spec.environ.items() if k != "TANDEM_LAUNCHER"})


def prefill_of(spec: ChildSpec) -> PrefillConfig:
    config = config_of(spec, PrefillConfig)
    assert isinstance(config, PrefillConfig)
    return config


def decode_of(spec: ChildSpec) -> DecodeConfig:
    config = config_of(spec, DecodeConfig)
    assert isinstance(config, DecodeConfig)
    return config


def router_of(spec: ChildSpec) -> RouterConfig:
    config = config_of(spec, RouterConfig)
    assert isinstance(config, RouterConfig)
    return config


def test_one_of_each_by_default() -> None:
    stack = plan()
    assert [spec.name for spec in stack.workers] == ["prefill-0", "decode-0"]
    prefill, decode, router = prefill_of(stack.workers[0]), decode_of(stack.workers[1]), router_of(stack.router)
    assert (prefill.worker_id, decode.worker_id, router.port) == ("prefill-0", "decode-0", 8123)
    assert {config.redis for config in (prefill, decode, router)} == {"redis://:hunter2@127.0.0.1:7000/0"}
    assert {config.model for config in (prefill, decode)} == {"/models/m"}
    assert prefill.served_model_name == ("m",)


def test_as_many_workers_as_asked_for() -> None:
    names = [spec.name for spec in plan("--prefill", "2", "--decode", "3").workers]
    assert names == ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"]


@pytest.mark.parametrize("flags", [("--colocated",), ("--prefill", "0")])
def test_colocated_has_no_prefill_workers(flags: tuple[str, ...]) -> None:
    stack = plan(*flags, "--decode", "2")
    assert [spec.name for spec in stack.workers] == ["decode-0", "decode-1"]
    assert all(decode_of(spec).colocated for spec in stack.workers)


def test_worker_flags_reach_the_workers_and_router_flags_the_router() -> None:
    stack = plan("--dtype", "float32", "--block-size=16", "--local-prefill-max-tokens", "0", "--max-queue", "7")
    prefill, decode, router = prefill_of(stack.workers[0]), decode_of(stack.workers[1]), router_of(stack.router)
    assert (prefill.dtype, prefill.block_size) == (decode.dtype, decode.block_size) == ("float32", 16)
    assert decode.local_prefill_max_tokens == 0
    assert router.max_queue == 7


@pytest.mark.parametrize("flag", ["--router-workers", "--api-server-count"])
def test_the_router_may_have_several_processes_and_workers_are_the_stacks(flag: str) -> None:
    assert router_of(plan(flag, "2").router).router_workers == 2
    with pytest.raises(SettingsError, match="give --elastic, too"):
        plan("--workers", "2")


def elastic_of(spec: ChildSpec) -> ElasticConfig:
    config = config_of(spec, ElasticConfig)
    assert isinstance(config, ElasticConfig)
    return config


@pytest.mark.parametrize(
    ("flags", "roles"),
    [
        (("--workers", "4"), ["prefill", "prefill", "decode", "decode"]),
        (("--workers", "3"), ["prefill", "decode", "decode"]),
        (("--workers", "2"), ["prefill", "decode"]),
        (("--workers", "1"), ["decode"]),
        ((), ["prefill", "decode"]),
        (("--prefill", "2"), ["prefill", "prefill", "decode"]),
        (("--workers", "4", "--prefill", "1"), ["prefill", "decode", "decode", "decode"]),
        (("--workers", "4", "--decode", "1"), ["prefill", "prefill", "prefill", "decode"]),
        (("--workers", "3", "--prefill", "2", "--decode", "1"), ["prefill", "prefill", "decode"]),
    ],
)
def test_an_elastic_fleet_begins_half_and_half_or_as_it_is_told(flags: tuple[str, ...], roles: list[str]) -> None:
    stack = plan("--elastic", *flags)
    assert [spec.name for spec in stack.workers] == [f"elastic-{index}" for index in range(len(roles))]
    assert [spec.argv[2] for spec in stack.workers] == ["services.elastic"] * len(roles)
    assert [elastic_of(spec).role for spec in stack.workers] == roles
    assert all(elastic_of(spec).worker_id == spec.name and not elastic_of(spec).colocated for spec in stack.workers)
    assert (stack.first_prompt_words > 1) == ("prefill" in roles)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--workers", "4", "--prefill", "2", "--decode", "1"), "--workers: 4 is not what --prefill and --decode"),
        (("--workers", "2", "--prefill", "2"), "--workers: 2 is too few"),
        (("--workers", "2", "--decode", "3"), "--workers: 2 is too few"),
        (("--workers", "-1"), "--workers: must not be negative"),
        (("--colocated",), "--elastic: excludes --colocated"),
        (("--tpot-objective", "-1"), "--tpot-objective: must not be negative"),
    ],
)
def test_an_elastic_fleet_that_cannot_be_is_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        plan("--elastic", *flags)


def test_objectives_reach_the_router_and_the_budgets_of_elastic_workers() -> None:
    stack = plan("--elastic", "--tpot-objective", "50", "--dtype", "float32", "--lease-ttl-s", "7")
    assert router_of(stack.router).tpot_objective == elastic_of(stack.workers[0]).tpot_objective == 50
    assert (elastic_of(stack.workers[0]).dtype, elastic_of(stack.workers[1]).lease_ttl_s) == ("float32", 7)
    assert router_of(plan("--tpot-objective", "50").router).tpot_objective == 50


def test_names_that_both_know_reach_both() -> None:
    stack = plan("--served-model-name", "a", "b", "--log-level", "debug")
    assert prefill_of(stack.workers[0]).served_model_name == router_of(stack.router).served_model_name == ("a", "b")
    assert prefill_of(stack.workers[0]).log_level == router_of(stack.router).log_level == "debug"
    assert stack.served_model_name == "a"


def test_settings_from_the_environment_are_passed_on_like_flags() -> None:
    stack = plan(environ={"TANDEM_MAX_NUM_SEQS": "8"})
    assert decode_of(stack.workers[1]).max_num_seqs == 8


def test_the_launchers_own_settings_do_not_leak_into_the_workers() -> None:
    for spec in (*plan().workers, plan().router):
        assert "TANDEM_PORT" not in spec.environ
        assert "TANDEM_MAX_NUM_SEQS" not in spec.environ
    assert prefill_of(plan("--port", "9").workers[0]).port == 0


def test_secrets_are_in_no_arguments() -> None:
    stack = plan("--api-key", "hunter2")
    assert not any("hunter2" in argument for spec in (*stack.workers, stack.router) for argument in spec.argv)
    assert router_of(stack.router).api_key == ("hunter2",)
    assert not any("TANDEM_API_KEY" in spec.environ for spec in stack.workers)
    assert stack.api_key == "hunter2"


def test_a_place_decides_threads_and_gpu_share_unless_the_user_does() -> None:
    places = [Placement((0,), 1, 1, "0", 0.5), Placement((1,), 1, 1, "0", 0.5)]
    prefill = plan(placements=places).workers[0]
    assert (prefill.cores, prefill.environ["OMP_NUM_THREADS"]) == ((0,), "1")
    assert prefill.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert (prefill_of(prefill).num_threads, prefill_of(prefill).gpu_memory_utilization) == (1, 0.45)
    told = plan("--num-threads", "3", "--gpu-memory-utilization", "0.3", placements=places).workers[0]
    assert (prefill_of(told).num_threads, prefill_of(told).gpu_memory_utilization) == (3, 0.3)


def test_workers_of_one_core_each_lend_each_other_what_is_idle_unless_the_user_says_otherwise() -> None:
    places = [Placement((0,), 1, num_others_cores=1), Placement((1,), 1, num_others_cores=1)]
    assert [prefill_of(worker).helper_threads for worker in plan(placements=places).workers[:1]] == [1]
    assert prefill_of(plan("--helper-threads", "0", placements=places).workers[0]).helper_threads == 0
    alone, wide = Placement((0,), 1), Placement((0, 1), 2, num_others_cores=2)
    on_gpu = Placement((0,), 1, 1, "0", 0.5)
    for place in (alone, wide, on_gpu):
        assert prefill_of(plan(placements=[place, place]).workers[0]).helper_threads == 0


def test_ranks_of_a_worker_divide_its_cores() -> None:
    places = [Placement(cores=(0, 1, 2, 3), num_threads=4), Placement(cores=(4, 5, 6, 7), num_threads=4)]
    flags = ("--engine", "vllm", "--tensor-parallel-size", "2")
    divided = plan(*flags, placements=places).workers[0]
    assert (prefill_of(divided).num_threads, divided.environ["OMP_NUM_THREADS"]) == (2, "2")
    told = plan(*flags, "--num-threads", "4", placements=places).workers[0]
    assert (prefill_of(told).num_threads, told.environ["OMP_NUM_THREADS"]) == (4, "4")


def test_openmps_own_number_of_threads_wins_over_the_place() -> None:
    worker = plan(placements=[Placement(num_threads=4)] * 2, inherited={"OMP_NUM_THREADS": "3"}).workers[0]
    assert (prefill_of(worker).num_threads, worker.environ["OMP_NUM_THREADS"]) == (0, "3")


def test_store_nodes_have_directories_and_names_of_their_own() -> None:
    stack = plan(
        "--stores", "2", "--store-dram-bytes", "64MiB", "--store-disk-dir", "/var/kv", "--kv-transport", "ucxx"
    )
    assert [spec.name for spec in stack.stores] == ["store-0", "store-1"]
    assert [spec.name for spec in stack.workers] == ["prefill-0", "decode-0"]
    for spec in stack.stores:
        config = resolve_settings(StoreConfig, spec.argv[3:], {"TANDEM_REDIS": spec.environ["TANDEM_REDIS"]})
        assert spec.argv[2] == "services.store"
        assert (config.worker_id, config.store_disk_dir) == (spec.name, f"/var/kv/{spec.name}")
        assert (config.store_dram_bytes, config.kv_transport) == (64 << 20, "ucxx")
        assert (config.served_model_name, config.redis) == (("m",), "redis://:hunter2@127.0.0.1:7000/0")
    assert plan().stores == ()


def test_what_is_said_of_store_nodes_is_not_taken_where_there_are_none() -> None:
    argv = ("--store-disk-dir", "/var/kv", "--store-write-through", "none")
    given = collect_settings(up_settings(), argv, {}, make_parser(up_settings()))
    with pytest.raises(SettingsError, match="--store-disk-dir: there is no store node; give --stores 1, too"):
        check_stores(UpConfig(), given)
    check_stores(UpConfig(stores=1), given)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-num-seqs", "-1"], "--max-num-seqs: must not be negative"),
        (["--prefill", "-1"], "--prefill: must not be negative"),
        (["--stores", "-1"], "--stores: must not be negative"),
        (["--store-dram-bytes", "0"], "--store-dram-bytes: must be positive"),
        (["--decode", "0"], "--decode: must be at least 1"),
        (["--worker-id", "x"], "--worker-id is not a setting"),
    ],
)
def test_mistakes_show_before_anything_starts(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        plan(*argv)


def test_settings_of_the_same_name_mean_the_same_to_router_and_workers() -> None:
    router = {item.name: item for item in router_settings()}
    for item in [*worker_settings(PrefillConfig), *worker_settings(ElasticConfig), *store_settings()]:
        if item.name in router:
            assert (item.hint, item.choices) == (router[item.name].hint, router[item.name].choices), item.name


def test_every_worker_gets_a_host_tier_of_the_size_that_was_asked_for() -> None:
    stack = plan("--kv-offloading-size", "1.5")
    assert prefill_of(stack.workers[0]).kv_offloading_size == decode_of(stack.workers[1]).kv_offloading_size == 1.5


def test_host_tiers_must_fit_into_the_machine_between_them() -> None:
    config, worker = UpConfig(prefill=2, decode=2), DecodeConfig(model="m", kv_offloading_size=2.0)
    check_offloading(config, worker, 8 << 30)
    check_offloading(config, worker, 0)
    with pytest.raises(SettingsError, match=r"4 workers want 8 GiB between them, and 7\.0 GiB") as caught:
        check_offloading(config, worker, 7 << 30)
    assert caught.value.setting == "kv_offloading_size"


def test_who_has_which_secret(tmp_path: Path) -> None:
    config, store, given = UpConfig(stores=1), StoreConfig(store_disk_dir=str(tmp_path)), {}
    with ExitStack() as cleanup:
        own = own_secrets(config, store, given, cleanup)
        make_secrets(own)
    secrets = tmp_path / "secrets"
    assert sorted(path.name for path in secrets.iterdir()) == ["peer-secret", "proof-key", "tenant-secret"]
    stack = plan("--stores", "1", *(word for name, each in own.items() for word in (flag(name), str(each.value))))
    had = {
        spec.name: {
            Path(word.partition("=")[2]).name for word in spec.argv if word.partition("=")[2].startswith(str(secrets))
        }
        for spec in (*stack.workers, *stack.stores, stack.router)
    }
    assert had == {
        "prefill-0": {"peer-secret", "proof-key"},
        "decode-0": {"peer-secret", "proof-key"},
        "store-0": {"peer-secret"},
        "router": {"peer-secret", "tenant-secret"},
    }


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def test_a_stack_keeps_its_secrets_where_its_blocks_stay_and_nowhere_else(tmp_path: Path) -> None:
    with ExitStack() as cleanup:
        one = own_secrets(UpConfig(), StoreConfig(), {}, cleanup)
        make_secrets(one)
        paths = [Path(str(each.value)) for each in one.values()]
        assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    assert not any(path.parent.exists() for path in paths)
    given = {"peer_secret": Given("x", "--peer-secret"), "proof_key_file": Given("y", "--proof-key-file")}
    with ExitStack() as cleanup:
        assert list(own_secrets(UpConfig(), StoreConfig(), given, cleanup)) == ["tenant_secret_file"]


def test_secrets_that_are_no_files_reach_processes_by_their_environment() -> None:
    secret = "0123456789abcdef" * 4
    stack = plan("--stores", "1", environ={"TANDEM_PEER_SECRET": secret, "TANDEM_PROOF_KEY": secret})
    processes = (*stack.workers, *stack.stores, stack.router)
    assert not any(secret in word for spec in processes for word in spec.argv)
    assert {spec.environ.get("TANDEM_PEER_SECRET") for spec in processes} == {secret}
    assert [spec.name for spec in processes if "TANDEM_PROOF_KEY" in spec.environ] == ["prefill-0", "decode-0"]
