"""What workers computed outlives them: a store node lends it from its memory, and after its own restart from disk."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from tandem.v1 import worker_pb2 as pb
from tandem.v1 import worker_pb2_grpc

from tests.hf_models import random_prompts, reference_greedy, write_model
from tests.stack import Stack

NUM_NEW_TOKENS = 40


@pytest.fixture(scope="module", params=["ucxx", "nixl"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Stack]]:
    directory = tmp_path_factory.mktemp(f"store-{request.param}")
    model = write_model(directory / "model", "qwen2")
    transport = ["--kv-transport", request.param]
    worker = ["--model", str(model), "--served-model-name", "m", "--num-gpu-blocks-override", "256", *transport]
    store = [*transport, "--store-dram-bytes", "64MiB", "--store-disk-dir", str(directory / "disk")]
    store += ["--store-disk-bytes", "64MiB"]
    decode = ["--local-prefill-max-tokens", "0"]
    with Stack(directory / "logs", [()], [decode, decode], store=[store], worker=worker) as stack:
        yield model, stack


async def generate(stack: Stack, prompt: list[int], sources: list[pb.PrefixSource]) -> tuple[list[int], pb.Usage]:
    """Have decode-1 and prefill-0 serve a prompt, as a router that gives these hints would."""
    records = {record.worker_id: record for record in stack.records()}
    target = records["prefill-0"]
    order = pb.GenerateRequest(
        handle=1,
        request_id="store",
        prompt_token_ids=prompt,
        sampling=pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=NUM_NEW_TOKENS, ignore_eos=True),
        prefill_targets=[
            pb.PrefillTarget(
                worker_id=target.worker_id,
                incarnation=target.incarnation,
                grpc_address=target.grpc_address,
                kv_address=target.kv_address,
            )
        ],
        prefix_sources=sources,
    )
    tokens: list[int] = []
    async with grpc.aio.insecure_channel(records["decode-1"].grpc_address) as channel:
        session = worker_pb2_grpc.DecodeServiceStub(channel).Session()
        await session.write(pb.SessionRequest(hello=pb.SessionHello(router_id="test", protocol_version="1")))
        await session.write(pb.SessionRequest(generate=order))
        async for frame in session:
            for output in frame.outputs:
                tokens += output.token_ids
                if output.finish_reason:
                    assert output.finish_reason == pb.FINISH_REASON_LENGTH, output.error
                    return tokens, output.usage
    raise AssertionError("the session ended early")


def source(stack: Stack, num_blocks: int, tier: str) -> pb.PrefixSource:
    record = next(record for record in stack.records() if record.worker_id == "store-0")
    return pb.PrefixSource(
        holder_id="store-0",
        incarnation=record.incarnation,
        kv_address=record.kv_address,
        num_blocks=num_blocks,
        tier=tier,
    )


def num_kept(stack: Stack, tier: str) -> int:
    found = stack.debug_state("store-0")[tier]
    assert isinstance(found, dict)
    return int(found["num_blocks"])


async def test_a_prefix_outlives_every_worker_in_the_stores_memory_and_the_store_itself_on_disk(
    served: tuple[Path, Stack],
) -> None:
    model, stack = served
    prompt = random_prompts([1000], seed=51)[0]
    expected = reference_greedy(model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
    num_prompt_blocks, num_all_blocks = len(prompt) // 32, (len(prompt) + NUM_NEW_TOKENS - 1) // 32

    tokens, usage = await generate(stack, prompt, [])
    assert (tokens, usage.num_cached_tokens) == (expected, 0)
    # Blocks that decode computed are kept, too.
    stack.wait_for(lambda: num_kept(stack, "dram") == num_all_blocks, "the store to have all blocks")

    for name in ("prefill-0", "decode-0", "decode-1"):
        stack.restart(name, signal.SIGKILL)
    tokens, usage = await generate(stack, prompt, [source(stack, num_prompt_blocks, "store")])
    assert tokens == expected
    (part,) = usage.fetched
    assert (part.holder_id, part.tier, part.num_blocks) == ("store-0", "store", num_prompt_blocks)
    assert usage.num_cached_tokens == num_prompt_blocks * 32

    stack.wait_for(lambda: num_kept(stack, "disk") == num_all_blocks, "all blocks to be on disk")
    for name in ("store-0", "prefill-0", "decode-0", "decode-1"):
        stack.restart(name, signal.SIGKILL)
    assert (num_kept(stack, "dram"), num_kept(stack, "disk")) == (0, num_all_blocks)
    tokens, usage = await generate(stack, prompt, [source(stack, num_prompt_blocks, "disk")])
    assert tokens == expected
    (part,) = usage.fetched
    assert (part.holder_id, part.tier, part.num_blocks) == ("store-0", "disk", num_prompt_blocks)
    stack.wait_for(lambda: num_lent(stack) == 0, "the store to have its blocks back")
    stack.check_clean()


def num_lent(stack: Stack) -> object:
    return stack.debug_state("store-0")["num_lent_blocks"]


async def test_the_router_finds_in_the_index_what_only_the_store_has(served: tuple[Path, Stack]) -> None:
    model, stack = served
    prompt = random_prompts([700], seed=52)[0]
    expected = reference_greedy(model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
    before = num_kept(stack, "disk")
    num_blocks = (len(prompt) + NUM_NEW_TOKENS - 1) // 32
    assert await ask(stack, prompt) == (expected, 0)
    stack.wait_for(lambda: num_kept(stack, "disk") == before + num_blocks, "the store to have all blocks")
    for name in ("prefill-0", "decode-0", "decode-1"):
        stack.restart(name)
    stack.wait_ready()
    tokens, num_cached = await ask(stack, prompt)
    assert tokens == expected
    assert num_cached == len(prompt) // 32 * 32


async def ask(stack: Stack, prompt: list[int]) -> tuple[list[int], int]:
    """One completion through the router: its token ids, and how many of the prompt were not computed."""
    body = {"model": "m", "prompt": prompt, "max_tokens": NUM_NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=60) as client:
        response = await client.post(f"{stack.url}/v1/completions", json=body | {"return_token_ids": True})
    response.raise_for_status()
    answer = response.json()
    return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]
