"""What a running stack exports is what docs/metrics.md says, and it adds up: requests, tokens, blocks, receipts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.hf_models import random_prompts
from tests.metrics_page import PAGE, documented_series
from tests.stack import Stack

MAX_TOKENS = 8
Scrape = dict[str, Metric]


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path]) -> Iterator[Stack]:
    worker = "--num-gpu-blocks-override 256 --kv-offloading-size 0.01 --prefix-fetch-timeout-s 30"
    store = "--store-dram-bytes 16MiB --store-disk-dir {disk} --store-disk-bytes 16MiB"
    with new_stack(model_of("qwen2"), worker, prefill=[""], decode=["", ""], store=[store]) as stack:
        yield stack


@pytest.fixture(scope="module")
def receipts(stack: Stack) -> list[dict]:
    """Of twelve requests: cold and warm prompts, handed off and prefilled locally, one with two answers."""
    found = []
    head, *tails = random_prompts([640, 40, 41, 42, 8, 9], seed=7)
    prompts = [
        head + tails[0],
        head + tails[1],
        head + tails[2],
        tails[3],
        tails[4],
        *random_prompts([300] * 6, seed=8),
    ]
    for number, prompt in enumerate(prompts):
        body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, "receipt": True}
        if number == len(prompts) - 1:
            body |= {"n": 2, "temperature": 1}
        answer = httpx.post(f"{stack.url}/v1/completions", json={"model": "m", **body}, timeout=60)
        assert answer.status_code == 200, answer.text
        found += answer.json()["receipt"]["sequences"]
    assert len(found) == 12
    for body, status in (({"model": "m", "prompt": ""}, 400), ({"model": "nobody", "prompt": "x"}, 404)):
        assert httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60).status_code == status
    stack.check_clean()  # what ended has been booked by everybody
    return found


@pytest.fixture(scope="module")
def scrapes(stack: Stack, receipts: list[dict]) -> dict[str, Scrape]:
    """By process, of a moment in which everybody has index and registry.

    A slow machine's Redis may have missed a deadline; it is asked again within a second.
    """
    found: dict[str, Scrape] = {}

    def all_are_up() -> bool:
        found.update({name: families_of(stack.metrics(name)) for name in stack.services})
        prefixes = {name: "tandem:router_" if name == "router" else "tandem:" for name in found}
        return all(
            total({name: found[name]}, f"{prefix}{what}_up") == 1
            for name, prefix in prefixes.items()
            for what in ("index", "registry")
        )

    stack.wait_for(all_are_up, "everybody to have index and registry")
    return found


def families_of(page: str) -> Scrape:
    families = list(text_string_to_metric_families(page))
    return {family.name: family for family in families if not family.name.startswith("process_")}


def total(scrapes: dict[str, Scrape], sample: str, role: str | None = None, **labels: str) -> float:
    """The sum of a sample over the processes of a role (all of them: None)."""
    return sum(
        each.value
        for name, scrape in scrapes.items()
        if role is None or name.startswith(role)
        for family in scrape.values()
        for each in family.samples
        if each.name == sample and labels.items() <= each.labels.items()
    )


@pytest.mark.parametrize("role", ["router", "prefill", "decode", "store"])
def test_each_process_exports_what_the_page_lists_and_nothing_else(scrapes: dict[str, Scrape], role: str) -> None:
    documented = documented_series()[role]
    assert len({series.name for series in documented}) == len(documented), "listed twice"
    expected = {series.family: series.type for series in documented}
    for name in [name for name in scrapes if name.startswith(role)]:
        assert {family.name: family.type for family in scrapes[name].values()} == expected


def test_labels_are_those_of_the_page_and_take_few_values(scrapes: dict[str, Scrape]) -> None:
    num_series = Counter()
    for name, scrape in scrapes.items():
        role = name.partition("-")[0]
        by_family = {series.family: series for series in documented_series()[role]}
        for family in scrape.values():
            series = by_family[family.name]
            expected = series.labels | ({"role"} if role != "router" else set())
            if role in ("prefill", "decode") or (role == "router" and family.name.startswith("vllm:")):
                expected |= {"model_name", "role"}
            for sample in family.samples:
                assert sample.labels.keys() - {"le"} == expected, (name, sample)
                if "role" in expected and "role" not in series.labels:
                    assert sample.labels["role"] == role
            num_series[name, family.name] = len([sample for sample in family.samples if "le" not in sample.labels])
            assert family.documentation.endswith(".") or family.type == "info", f"{family.name} explains itself"
    assert max(num_series.values()) <= 48, num_series.most_common(3)


def test_every_series_has_samples_from_the_start(scrapes: dict[str, Scrape]) -> None:
    empty = {family.name for scrape in scrapes.values() for family in scrape.values() if not family.samples}
    # What did not happen in every process, and whose labels are not known before it does.
    transfers = {f"tandem:transfer_{what}" for what in ("seconds", "bytes", "bytes_per_second")}
    of_elastic = {
        "tandem:worker_role",
        "tandem:requests_objective_met",
    }  # there are neither such workers nor objectives
    assert empty <= {"tandem:router_fetched_blocks", "tandem:router_fetched_bytes", *transfers, *of_elastic}


def test_every_request_is_counted_once_by_the_router_and_once_by_the_workers(
    scrapes: dict[str, Scrape], receipts: list[dict]
) -> None:
    num, num_generated = len(receipts), sum(receipt["completion_tokens"] for receipt in receipts)
    num_prompt = sum(receipt["prompt_tokens"] for receipt in receipts)
    for role in ("router", "decode"):
        assert total(scrapes, "vllm:request_success_total", role, finished_reason="length") == num
        assert total(scrapes, "vllm:request_success_total", role) == num
        for name in (
            "e2e_request_latency_seconds",
            "time_to_first_token_seconds",
            "request_time_per_output_token_seconds",
            "request_decode_time_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
        ):
            assert total(scrapes, f"vllm:{name}_count", role) == num, name
            assert total(scrapes, f"vllm:{name}_sum", role) > 0, name
        assert total(scrapes, "vllm:inter_token_latency_seconds_count", role) == num_generated - num
        assert total(scrapes, "vllm:request_prompt_tokens_sum", role) == num_prompt
        assert total(scrapes, "vllm:request_generation_tokens_sum", role) == num_generated
    for name in ("request_queue_time_seconds", "request_prefill_time_seconds"):
        workers = total(scrapes, f"vllm:{name}_count", "prefill") + total(scrapes, f"vllm:{name}_count", "decode")
        assert total(scrapes, f"vllm:{name}_count", "router") == workers == num
    generated = total(scrapes, "vllm:generation_tokens_total", "router")
    assert generated == num_generated == total(scrapes, "vllm:generation_tokens_total") - generated
    computed = total(scrapes, "vllm:prompt_tokens_total", "prefill") + total(
        scrapes, "vllm:prompt_tokens_total", "decode"
    )
    assert computed == sum(receipt["computed_tokens"] for receipt in receipts)
    assert total(scrapes, "tandem:router_requests_total", endpoint="/v1/completions", status="200") == num - 1
    assert total(scrapes, "tandem:router_requests_total", endpoint="/v1/completions", status="400") == 1
    assert total(scrapes, "tandem:router_requests_total", endpoint="/v1/completions", status="404") == 1
    assert total(scrapes, "tandem:router_decisions_total") == num
    assert total(scrapes, "vllm:num_requests_running") == total(scrapes, "vllm:num_requests_waiting") == 0


def test_counters_are_the_sums_of_the_receipts(scrapes: dict[str, Scrape], receipts: list[dict]) -> None:
    handoffs = [receipt for receipt in receipts if not receipt["prefilled_locally"]]
    assert 0 < len(handoffs) < len(receipts)
    for role, prefix in (("router", "tandem:router_"), ("decode", "tandem:")):
        for key in ("blocks", "bytes"):
            expected = sum(receipt["handoff"][key] for receipt in receipts)
            assert total(scrapes, f"{prefix}handoff_{key}_total", role) == expected > 0
        assert total(scrapes, f"{prefix}recomputes_total", role) == sum(receipt["recomputes"] for receipt in receipts)
    assert total(scrapes, "tandem:prefills_total", way="handoff") == len(handoffs)
    assert total(scrapes, "tandem:prefills_total", way="local") == len(receipts) - len(handoffs)
    assert total(scrapes, "tandem:prefill_orders_total", outcome="finished") == len(handoffs)
    for source in ("computed", "reused", "fetched"):
        expected = sum(receipt[f"{source}_tokens"] for receipt in receipts)
        assert total(scrapes, "tandem:router_receipt_prompt_tokens_total", source=source) == expected
    cached = sum(receipt["reused_tokens"] + receipt["fetched_tokens"] for receipt in receipts)
    assert total(scrapes, "vllm:prefix_cache_hits_total", "router") == cached > 0
    num_fetched = sum(part["blocks"] for receipt in receipts for part in receipt["fetched"])
    assert total(scrapes, "tandem:router_fetched_blocks_total") == num_fetched
    assert total(scrapes, "tandem:prefix_fetched_blocks_total") == num_fetched
    assert total(scrapes, "tandem:digests_failed_total") == 0


def test_the_stages_of_a_handoff_follow_each_other(scrapes: dict[str, Scrape], receipts: list[dict]) -> None:
    def seconds(stage: str) -> float:
        return total(scrapes, "tandem:request_stage_seconds_sum", "decode", stage=stage)

    num_handoffs = sum(not receipt["prefilled_locally"] for receipt in receipts)
    stages = re.findall(r"^\| `(\w+)` \|", PAGE.read_text().partition("## Stages of a request")[2], re.MULTILINE)
    for stage in stages:
        count = total(scrapes, "tandem:request_stage_seconds_count", "decode", stage=stage)
        expected = len(receipts) if stage in ("first_token", "decode", "total") else num_handoffs
        assert count == (0 if stage == "step_alignment" else expected), stage  # the first token came with the blocks
    whole = seconds("order") + seconds("prefill_queue") + seconds("prefill") + seconds("handoff")
    assert seconds("read") + seconds("confirm") + seconds("join") == pytest.approx(seconds("handoff"), abs=1e-6)
    assert 0 < whole < seconds("total")


def test_transfers_steps_and_services_have_sane_values(scrapes: dict[str, Scrape]) -> None:
    handed_off = total(scrapes, "tandem:handoff_bytes_total", "decode")
    read = total(scrapes, "tandem:transfer_bytes_total", "decode", outcome="ok")
    assert read == handed_off + total(scrapes, "tandem:prefix_fetched_bytes_total", "decode")
    num_reads = total(scrapes, "tandem:transfer_seconds_count", "decode")
    assert num_reads == total(scrapes, "tandem:transfer_bytes_per_second_count", "decode") > 0
    assert total(scrapes, "tandem:transfer_bytes_per_second_sum", "decode") > num_reads * 1e4
    # Of the prefill worker the store node reads, too, and goes on while we look.
    num_fetches = total(scrapes, "tandem:fetches_total", "decode", outcome="ok")
    num_prefixes = total(scrapes, "tandem:prefix_fetches_total", "decode", outcome="ok")
    assert num_fetches == total(scrapes, "tandem:prefills_total", way="handoff") + num_prefixes
    num_leases = total(scrapes, "tandem:leases_total", "prefill", outcome="confirmed")
    assert num_leases >= total(scrapes, "tandem:prefills_total", way="handoff") > 0
    for role in ("prefill", "decode"):
        num_steps = total(scrapes, "tandem:step_seconds_count", role)
        assert total(scrapes, "tandem:step_tokens_sum", role) >= total(scrapes, "tandem:step_sequences_sum", role)
        assert total(scrapes, "tandem:step_sequences_sum", role) >= num_steps > 0
    assert total(scrapes, "tandem:registry_up") == total(scrapes, "tandem:index_up") == 4
    assert total(scrapes, "tandem:router_registry_up") == total(scrapes, "tandem:router_index_up") == 1
    assert total(scrapes, "tandem:router_sessions_up") == 2
    assert 0 <= total(scrapes, "vllm:kv_cache_usage_perc") < 0.5
