"""An elastic fleet as its users see it: two workers that do both, over real sockets, and what becomes of either."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tandem.v1 import worker_pb2 as pb

from kvstore.registry import WorkerRecord
from tests.completions import Client
from tests.e2e.conftest import PATIENT, PATIENT_ROUTER
from tests.hf_models import random_prompts, reference_greedy
from tests.peers import AUTHORIZATION, session_with
from tests.stack import Stack
from tests.waiting import until

NUM_NEW_TOKENS = 12
NUM_STREAMED_TOKENS = 300  # which go on still when the last of several has begun
ROLES = ("prefill", "decode")
pytestmark = pytest.mark.on_vllm(slow=True)


@pytest.fixture(scope="module")
def model(model_of: Callable[[str], Path]) -> Path:
    return model_of("qwen3")


@pytest.fixture(scope="module")
def stack(model: Path, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    worker = f"{PATIENT} --num-gpu-blocks-override 256 --max-num-batched-tokens 64"
    with Stack(
        tmp_path_factory.mktemp("logs"),
        decode=(),
        elastic=[f"--role {role}" for role in ROLES],
        worker=worker,
        router=PATIENT_ROUTER,
        model=model,
        engine=engine,
    ) as stack:
        yield stack


async def test_prompts_are_computed_by_the_one_and_go_on_at_the_other(stack: Stack, model: Path) -> None:
    prompts = random_prompts([1, 15, 33, 64, 200, 333, 700], seed=1)
    expected = reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    async with Client(stack, NUM_NEW_TOKENS) as client:
        answers = await asyncio.gather(*(client.complete(prompt) for prompt in prompts))
    assert [answer.tokens for answer in answers] == expected
    assert stack.metric("elastic-0", "tandem:prefill_orders_total", outcome="finished") > 0
    assert stack.metric("elastic-1", "tandem:handoff_blocks_total") > 0
    assert [stack.debug_state(f"elastic-{index}")["role_now"] for index in (0, 1)] == list(ROLES)
    stack.check_clean()


def target(record: WorkerRecord) -> pb.PrefillTarget:
    return pb.PrefillTarget(
        worker_id=record.worker_id,
        incarnation=record.incarnation,
        grpc_address=record.grpc_address,
        kv_address=record.kv_address,
    )


async def redirected(
    at: WorkerRecord, prompts: Sequence[list[int]], begin: Sequence[pb.PrefillTarget], end: Sequence[pb.PrefillTarget]
) -> list[pb.Output]:
    """Order prompts of a decode worker, and redirect the last one when the first one has a token: it waits behind the
    others still. Returns last outputs, each with all tokens.
    """
    said: dict[int, list[int]] = {handle: [] for handle in range(len(prompts))}
    ended: dict[int, pb.Output] = {}
    sampling = pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    async with session_with(at.grpc_address) as session:
        await session.write(pb.SessionRequest(hello=pb.SessionHello(router_id="test", protocol_version="2")))
        for handle, prompt in enumerate(prompts):
            order = pb.GenerateRequest(
                handle=handle,
                request_id=f"{at.worker_id}-{handle}",
                prompt_token_ids=prompt,
                sampling=sampling,
                prefill_targets=begin,
            )
            await session.write(pb.SessionRequest(generate=order))
        redirect = pb.RedirectRequest(handle=len(prompts) - 1, prefill_targets=end)
        async for frame in session:
            if frame.outputs and not any(said.values()):
                await session.write(pb.SessionRequest(redirect=redirect))
            for output in frame.outputs:
                if not output.finish_reason:
                    said[output.handle] += output.token_ids
            for handle, token_id in zip(frame.handles, frame.token_ids, strict=True):
                said[handle].append(token_id)
            for output in frame.outputs:
                if output.finish_reason:
                    ended[output.handle] = output
            if len(ended) == len(prompts):
                break
        session.cancel()
    for handle, output in ended.items():
        output.token_ids[:] = [*said[handle], *output.token_ids]
    return [ended[handle] for handle in range(len(prompts))]


@pytest.mark.parametrize("is_elsewhere", [True, False])
async def test_a_prompt_that_waits_goes_on_at_the_other(stack: Stack, model: Path, is_elsewhere: bool) -> None:
    prompts = random_prompts([900] * 5, seed=3 + is_elsewhere)
    expected = reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    records = {record.worker_id: record for record in stack.records()}
    here, there = records["elastic-1"], [target(records["elastic-0"])]
    begin, end = ([], there) if is_elsewhere else (there, [])
    outputs = await redirected(here, prompts, begin, end)
    assert [list(output.token_ids) for output in outputs] == expected
    usage = outputs[-1].usage
    assert usage.num_redirects == 1
    assert (usage.prefilled_locally, usage.prefill_worker_id) == (not is_elsewhere, "elastic-0" if is_elsewhere else "")
    stack.check_clean()


async def streamed(client: Client, prompt: list[int], has_begun: asyncio.Event) -> list[int]:
    tokens: list[int] = []
    async with client.stream(prompt, max_tokens=NUM_STREAMED_TOKENS) as chunks:
        async for chunk in chunks:
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                tokens += choice["token_ids"]
            if tokens:
                has_begun.set()
    return tokens


@pytest.mark.parametrize("how", ["drained", "killed"])
async def test_the_other_goes_on_with_all_streams_and_prompts(stack: Stack, model: Path, how: str) -> None:
    """One that is left prefills and decodes by itself, whatever its role is; behind it the lost one comes back."""
    prompts = random_prompts([100] * 4, seed=13)
    expected = reference_greedy(model, prompts, NUM_STREAMED_TOKENS, ignore_eos=True)
    victim = stack.services["elastic-1"]
    async with Client(stack, NUM_NEW_TOKENS) as client:
        begun = [asyncio.Event() for _ in prompts]
        streams = [asyncio.create_task(streamed(client, *each)) for each in zip(prompts, begun, strict=True)]
        await asyncio.gather(*(event.wait() for event in begun))
        if how == "killed":
            victim.process.kill()
        else:
            assert (await client.http.post(f"{victim.debug_url}/drain", headers=AUTHORIZATION)).status_code == 202
        assert await asyncio.gather(*streams) == expected
        if how == "drained":
            await until(lambda: stack.debug_state("elastic-1")["kept"] == 0)
            victim.process.terminate()
            await asyncio.to_thread(victim.process.join, 60)
            assert victim.process.exitcode == 0, victim.log
        answer = await client.complete(random_prompts([300], seed=17)[0])
        assert (answer.receipt["decode_worker_id"], len(answer.tokens)) == ("elastic-0", NUM_NEW_TOKENS)
        stack.restart("elastic-1")
        stack.wait_ready()
    stack.check_clean()
