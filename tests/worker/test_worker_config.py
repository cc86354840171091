"""Worker settings that cannot work are refused at once, by the name of their flag."""

from __future__ import annotations

import pytest

from services.decode.config import DecodeConfig
from services.prefill.config import PrefillConfig
from services.settings import SettingsError
from services.worker.assembly import exchange_timeouts
from services.worker.config import WorkerConfig


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


def test_a_wildcard_address_needs_one_that_others_can_dial() -> None:
    assert WorkerConfig(model="m", host="0.0.0.0", advertise_host="10.0.0.7").advertise_host == "10.0.0.7"


def test_a_lease_must_outlive_a_heartbeat() -> None:
    with pytest.raises(SettingsError, match="above 1"):
        PrefillConfig(model="m", lease_ttl_s=0.5)


def test_the_handoff_timeout_reaches_every_stage_after_the_offer() -> None:
    timeouts = exchange_timeouts(DecodeConfig(model="m", handoff_timeout_s=600, prefill_queue_timeout_s=300))
    assert (timeouts.offer_s, timeouts.reserve_s, timeouts.announce_s) == (300, 600, 600)
    assert (timeouts.read_s, timeouts.confirm_s) == (600, 600)
    assert exchange_timeouts(PrefillConfig(model="m", lease_ttl_s=7, lease_max_s=70)).lease_max_s == 70
