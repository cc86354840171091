"""A transport whose thread hangs: blocks go another way, or are computed; nobody's stream ends for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.held_threads import held, named, ucx_thread
from tests.hf_models import random_prompts, reference_greedy
from tests.orders import Orders
from tests.stack import Stack

NUM_NEW_TOKENS = 8
pytestmark = pytest.mark.slow


@pytest.fixture
def make_stack(new_stack: Callable[..., Stack], model_of: Callable[[str], Path]) -> Callable[[str], Stack]:
    def make(transport: str) -> Stack:
        worker = f"--kv-transport {transport} --num-gpu-blocks-override 256 --peer-timeout-s 4"
        return new_stack(model_of("llama3"), worker, prefill=[""], decode=["--local-prefill-max-tokens 0"])

    return make


def pid_of(stack: Stack, name: str) -> int:
    return stack.services[name].process.pid or 0


def is_ready(stack: Stack, name: str) -> bool:
    return httpx.get(f"{stack.services[name].debug_url}/ready", timeout=30).status_code == 200


def condition(stack: Stack, name: str, transport: str) -> str:
    exchange = stack.debug_state(name)["exchange"]
    assert isinstance(exchange, dict)
    return str(exchange["transports"][transport])


def num_handed_off(stack: Stack) -> float:
    return stack.metric("decode-0", "tandem:prefills_total", way="handoff")


async def test_blocks_go_over_ucxx_while_the_nixl_agent_hangs(make_stack: Callable[[str], Stack]) -> None:
    prompts = random_prompts([200, 210, 220], seed=61)
    with make_stack("auto") as stack:
        orders, expected = (
            Orders(stack, NUM_NEW_TOKENS),
            reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True),
        )
        assert (await orders.generate(prompts[0], "decode-0", "prefill-0", []))[0] == expected[0]
        assert num_handed_off(stack) == 1
        with held(named(pid_of(stack, "decode-0"), "kv-nixl")[0]):
            stack.wait_for(lambda: condition(stack, "decode-0", "nixl") == "stands still", "the watchdog to see it")
            assert stack.metric("decode-0", "tandem:stuck_seconds", part="nixl") > 2
            assert is_ready(stack, "decode-0")
            assert (await orders.generate(prompts[1], "decode-0", "prefill-0", []))[0] == expected[1]
            assert num_handed_off(stack) == 2
        stack.wait_for(lambda: condition(stack, "decode-0", "nixl") == "ok", "the agent to get on")
        assert (await orders.generate(prompts[2], "decode-0", "prefill-0", []))[0] == expected[2]
        assert num_handed_off(stack) == 3
        stack.check_clean()


async def test_without_a_transport_a_decode_worker_computes_and_a_prefill_worker_is_not_ready(
    make_stack: Callable[[str], Stack],
) -> None:
    prompts = random_prompts([200, 210, 220], seed=62)
    with make_stack("ucxx") as stack:
        orders, expected = (
            Orders(stack, NUM_NEW_TOKENS),
            reference_greedy(stack.model, prompts, NUM_NEW_TOKENS, ignore_eos=True),
        )
        assert (await orders.generate(prompts[0], "decode-0", "prefill-0", []))[0] == expected[0]
        for name, stays_ready in (("decode-0", True), ("prefill-0", False)):
            with held(ucx_thread(pid_of(stack, name))):
                stack.wait_for(
                    lambda name=name: condition(stack, name, "ucxx") == "stands still", "the watchdog to see it"
                )
                assert is_ready(stack, name) == stays_ready
                if stays_ready:
                    assert (await orders.generate(prompts[1], "decode-0", "prefill-0", []))[0] == expected[1]
            stack.wait_for(lambda name=name: condition(stack, name, "ucxx") == "ok", "UCX to get on")
            stack.wait_for(lambda name=name: is_ready(stack, name), f"{name} to be ready")
        assert num_handed_off(stack) == 1
        stack.check_clean()
