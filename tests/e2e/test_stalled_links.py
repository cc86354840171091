"""The bytes of blocks come no more while the peer speaks on: the prompt goes another way after `--peer-timeout-s`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.black_hole import black_hole
from tests.hf_models import random_prompts, reference_greedy
from tests.orders import Orders
from tests.stack import Stack

NUM_NEW_TOKENS = 8

pytestmark = pytest.mark.on_vllm(slow=True)


@pytest.fixture(params=["ucxx", pytest.param("nixl", marks=pytest.mark.slow)])
def stack(
    request: pytest.FixtureRequest, new_stack: Callable[..., Stack], model_of: Callable[[str], Path]
) -> Iterator[Stack]:
    """nixl over tcp as well: by its lanes within a machine there is nothing between the two that could be lost.

    With two network devices to choose from: of a link that stands still over its only one, UCX ends the owner's process
    (`Fatal: unexpected error: Endpoint timeout`). So tcp is nixl's last resort, which `auto` never takes beside ucxx.
    """
    worker = f"--kv-transport {request.param} --num-gpu-blocks-override 256 --peer-timeout-s 10"
    environ = {"UCX_TLS": "tcp,self"} | ({"UCX_NET_DEVICES": "all"} if request.param == "nixl" else {})
    with new_stack(
        model_of("llama3"), worker, prefill=[""], decode=["--local-prefill-max-tokens 0"], environ=environ
    ) as stack:
        yield stack


async def test_a_link_that_brings_nothing_costs_one_handoff_and_a_moment(stack: Stack) -> None:
    orders = Orders(stack, NUM_NEW_TOKENS)
    prompts = random_prompts([200, 300, 310], seed=51)
    expected = reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    decode, prefill = (stack.services[name].process.pid or 0 for name in ("decode-0", "prefill-0"))
    ports = [
        int(address.rsplit(":", 1)[1]) for each in stack.records() for address in (each.grpc_address, each.kv_address)
    ]

    def num_failed(cause: str) -> float:
        return stack.metric("decode-0", "tandem:handoff_failures_total", cause=cause)

    assert (await orders.generate(prompts[0], "decode-0", "prefill-0", []))[0] == expected[0]
    num_lost = num_failed("peer_lost")
    with black_hole(decode, prefill, ports) as num_held:
        assert num_held > 0, "no connection carries blocks"
        assert (await orders.generate(prompts[1], "decode-0", "prefill-0", []))[0] == expected[1]
        assert "the link stands still" in stack.services["decode-0"].log
        assert (num_failed("peer_lost"), num_failed("timeout")) == (num_lost + 1, 0)  # 60 s would be a time-out

    num_handed_off = stack.metric("decode-0", "tandem:prefills_total", way="handoff")

    async def is_served_again() -> bool:
        tokens, _ = await orders.generate(prompts[2], "decode-0", "prefill-0", [])
        assert tokens == expected[2]
        return stack.metric("decode-0", "tandem:prefills_total", way="handoff") > num_handed_off

    async with asyncio.timeout(120):
        while not await is_served_again():
            pass
    stack.check_clean()
