"""KV in 8 bits through a whole stack: tokens are those of one worker alone, and nothing is shared with others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from kvstore.block import BlockLayout
from services.engine.native.kernels import choose_kernels
from tests.hf_models import random_prompts, write_model
from tests.orders import Orders
from tests.stack import Stack

NUM_NEW_TOKENS = 24


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """prefill-0, decode-0, decode-1 and the store keep 8 bits, the others the model's dtype."""
    if choose_kernels().library is None:
        pytest.skip("torch computes here, whose bits depend on how a prompt is cut up")
    model = write_model(tmp_path_factory.mktemp("int8") / "model", "qwen3", dtype="bfloat16", head_dim=64)
    int8 = "--kv-cache-dtype int8 --served-model-name int8"
    worker = "--kv-transport nixl --num-gpu-blocks-override 256 --local-prefill-max-tokens 0"
    plain = worker.partition(" --local")[0]
    store = "--kv-transport nixl --served-model-name int8 --store-dram-bytes 64MiB"
    with new_stack(
        model,
        prefill=[f"{plain} {int8} --max-num-batched-tokens 64", plain],
        decode=[f"{worker} {int8}", f"{worker} {int8}", worker],
        store=[store],
        router="--index-timeout 5",
        worker="--prefix-fetch always --prefix-fetch-timeout-s 30",
    ) as stack:
        yield stack


def layout_of(stack: Stack, worker_id: str) -> BlockLayout:
    (record,) = [record for record in stack.records() if record.worker_id == worker_id]
    return BlockLayout.from_wire(record.layout)


async def test_disaggregated_is_colocated_token_for_token_and_stores_give_back_what_workers_computed(
    stack: Stack,
) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    prompts = random_prompts([1, 31, 32, 65, 200, 333, 700], seed=5)
    for prompt in prompts:
        alone, usage = await orders.generate(prompt, "decode-1", None, [])
        assert usage.num_cached_tokens == 0
        handed_over, _ = await orders.generate(prompt, "decode-0", "prefill-0", [])
        assert handed_over == alone, len(prompt)
    assert stack.metric("decode-0", "tandem:prefills_total", way="handoff") == len(prompts)
    assert stack.metric("decode-0", "tandem:digests_failed_total") == 0

    longest, num_blocks = prompts[-1], len(prompts[-1]) // 32

    def num_stored() -> int:
        tier = stack.debug_state("store-0")["dram"]
        assert isinstance(tier, dict)
        return int(tier["num_blocks"])

    stack.wait_for(lambda: num_stored() >= sum(len(prompt) // 32 for prompt in prompts), "the store to have all blocks")
    stack.restart("decode-0", "decode-1", "prefill-0")
    again, usage = await orders.generate(longest, "decode-1", None, [orders.source("store-0", num_blocks, "store")])
    assert again == alone
    assert [(part.holder_id, part.num_blocks) for part in usage.fetched] == [("store-0", num_blocks)]
    stack.check_clean()


async def test_workers_of_both_kinds_share_no_block_and_say_why(stack: Stack) -> None:
    int8, plain = (layout_of(stack, worker_id) for worker_id in ("prefill-0", "prefill-1"))
    assert (int8.block_bytes, plain.block_bytes) == (plain.block_bytes * (64 + 4) // 128, plain.block_bytes)
    orders = Orders(stack, NUM_NEW_TOKENS)
    (prompt,) = random_prompts([150], seed=6)
    for decode, own, other in (("decode-0", "prefill-0", "prefill-1"), ("decode-2", "prefill-1", "prefill-0")):
        expected, _ = await orders.generate(prompt, decode, own, [])
        before = stack.metric(decode, "tandem:handoff_failures_total", cause="incompatible")
        (fresh,) = random_prompts([150], seed=7)
        tokens, usage = await orders.generate(fresh, decode, other, [orders.source(other, 4)])
        assert len(tokens) == NUM_NEW_TOKENS, "computed by itself"
        assert not usage.fetched
        assert stack.metric(decode, "tandem:handoff_failures_total", cause="incompatible") == before + 1
        log = stack.services[decode].log
        assert f"blocks of {other}" in log
        assert "scales: ours" in log
        assert (await orders.generate(prompt, decode, own, []))[0] == expected
    stack.check_clean()


async def test_metrics_and_records_name_what_keys_and_values_are_kept_in(stack: Stack) -> None:
    kept = {record.worker_id: record.dtype for record in stack.records()}
    int8 = dict.fromkeys(("prefill-0", "decode-0", "decode-1", "store-0"), "int8")
    assert kept == int8 | dict.fromkeys(("prefill-1", "decode-2"), "bfloat16")
    assert 'cache_dtype="int8"' in stack.metrics("prefill-0")
    assert 'cache_dtype="bfloat16"' in stack.metrics("prefill-1")
    model = {record.worker_id: record.model_fingerprint for record in stack.records()}
    assert len({model[name] for name in int8}) == 1
    assert model["decode-2"] == model["prefill-1"] != model["decode-0"]
