"""Worker settings that cannot work are refused at once, by the name of their flag."""

from __future__ import annotations

import pytest

from services.decode.config import DecodeConfig
from services.engine.request import MAX_LOGPROBS, SamplingParams
from services.peer_settings import PeerProofs, PeerSettings
from services.prefill.config import PrefillConfig
from services.router.config import RouterConfig
from services.settings import SettingsError
from services.store.config import StoreConfig
from services.worker.assembly import exchange_timeouts
from services.worker.config import WorkerConfig
from services.worker.load import threads_of_rank


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"peer_timeout_s": 0.4}, "peer_timeout_s"),
        ({"host": "0.0.0.0"}, "host"),
        ({"max_num_seqs": -1}, "max_num_seqs"),
        ({"kv_port": 65_536}, "kv_port"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"kv_offloading_size": -1.0}, "kv_offloading_size"),
        ({"kv_offloading_size": float("inf")}, "kv_offloading_size"),
        ({"kv_offloading_size": float("nan")}, "kv_offloading_size"),
        ({"kv_offloading_size": 1.0, "enable_prefix_caching": False}, "kv_offloading_size"),
        ({"model": ""}, "model"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, object], setting: str) -> None:
    with pytest.raises(SettingsError) as caught:
        WorkerConfig(**{"model": "m", **fields})  # type: ignore[arg-type]
    assert caught.value.setting == setting


@pytest.mark.parametrize(
    ("fields", "environ", "num_threads"),
    [
        ({}, {}, 8),
        ({"num_threads": 3}, {"OMP_NUM_THREADS": "5"}, 3),
        ({}, {"OMP_NUM_THREADS": "5"}, 5),
        ({}, {"OMP_NUM_THREADS": "4,2"}, 4),
        ({}, {"OMP_NUM_THREADS": "many"}, 8),
        ({"engine": "vllm", "engine_args": "--tensor-parallel-size 2"}, {}, 4),
        ({"engine": "vllm", "engine_args": "--tensor-parallel-size 16"}, {}, 1),
        ({"engine": "vllm", "engine_args": "-tp 2", "num_threads": 8}, {}, 8),
        ({"engine": "vllm", "engine_args": "-tp 2"}, {"OMP_NUM_THREADS": "8"}, 8),
    ],
)
def test_ranks_divide_the_cores_unless_the_user_says_how_many_each_takes(
    fields: dict[str, object], environ: dict[str, str], num_threads: int
) -> None:
    config = WorkerConfig(model="m", **fields)  # type: ignore[arg-type]
    assert threads_of_rank(config, num_cores=8, environ=environ) == num_threads


def test_the_router_takes_no_more_log_probabilities_than_workers_do() -> None:
    assert SamplingParams(logprobs=RouterConfig(max_logprobs=MAX_LOGPROBS).max_logprobs).logprobs == MAX_LOGPROBS
    with pytest.raises(SettingsError, match=rf"from 0 to {MAX_LOGPROBS}, got {MAX_LOGPROBS + 1}") as caught:
        RouterConfig(max_logprobs=MAX_LOGPROBS + 1)
    assert caught.value.setting == "max_logprobs"


def test_a_wildcard_address_needs_one_that_others_can_dial() -> None:
    host = {"model": "m", "host": "0.0.0.0", "peer_secret": "s"}
    assert WorkerConfig(**host, advertise_host="10.0.0.7").advertise_host == "10.0.0.7"
    with pytest.raises(SettingsError, match="give --advertise-host too"):
        WorkerConfig(**host)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.7", "::", "", "gpu-3"])
@pytest.mark.parametrize("config", [WorkerConfig, StoreConfig, RouterConfig])
def test_whoever_listens_to_others_needs_a_secret_to_know_peers_by(config: type[PeerSettings], host: str) -> None:
    model: dict[str, str] = {"model": "m", "advertise_host": "a"} if config is WorkerConfig else {}
    with pytest.raises(SettingsError, match="give --peer-secret-file, too") as caught:
        config(host=host, **model)
    assert caught.value.setting == "host"
    for given in ({"peer_secret": "s"}, {"peer_secret_file": "f"}):
        assert config(host=host, **given, **model).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_whoever_listens_to_this_machine_alone_needs_none(host: str) -> None:
    assert StoreConfig(host=host).read_peer_proofs() == PeerProofs()


def test_a_lease_must_outlive_a_heartbeat() -> None:
    with pytest.raises(SettingsError, match="above 1"):
        PrefillConfig(model="m", lease_ttl_s=0.5)


def test_the_handoff_timeout_reaches_every_stage_after_the_offer() -> None:
    timeouts = exchange_timeouts(DecodeConfig(model="m", handoff_timeout_s=600, prefill_queue_timeout_s=300))
    assert (timeouts.offer_s, timeouts.reserve_s, timeouts.announce_s) == (300, 600, 600)
    assert (timeouts.read_s, timeouts.confirm_s) == (600, 600)
    assert exchange_timeouts(PrefillConfig(model="m", lease_ttl_s=7, lease_max_s=70)).lease_max_s == 70
