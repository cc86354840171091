"""What production does to a serving system: processes die or hang, Redis goes, peers do not fit, garbage comes in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import broken_steps
from tests.completions import Client
from tests.e2e.conftest import PATIENT_ROUTER
from tests.hf_models import random_prompts, reference_greedy, write_model
from tests.peers import AUTHORIZATION, session_with
from tests.stack import Stack
from tests.waiting import until

NUM_NEW_TOKENS = 16
NUM_STREAMED_TOKENS = 150
NUM_TOKENS_OF_LONG_STREAMS = 400  # which go on still when the last of several has begun

pytestmark = pytest.mark.on_vllm


@pytest.fixture(scope="module")
def model(model_of: Callable[[str], Path]) -> Path:
    return model_of("qwen3")


@pytest.fixture
def make_stack(model: Path, engine: str, tmp_path: Path) -> Callable[..., Stack]:
    def make(
        num_prefill: int = 1, num_decode: int = 1, transport: str = "auto", patience: str = "20", lease: str = "5"
    ) -> Stack:
        """`patience` and `lease` in seconds: of peers with each other, and of the registry with them.

        Short only where a test needs the end of it: of who hangs, and of leases without Redis. Who dies is missed at
        once, and on a busy machine everybody hangs for a second.
        """
        worker = f"--kv-transport {transport} --num-gpu-blocks-override 256"
        worker += f" --peer-timeout-s {patience} --lease-s {lease}"
        prefill = ["--max-num-batched-tokens 64"] * num_prefill
        decode = ["--local-prefill-max-tokens 0"] * num_decode
        logs = tmp_path / "logs"
        return Stack(logs, prefill, decode, worker=worker, router=PATIENT_ROUTER, model=model, engine=engine)

    return make


async def complete(client: Client, prompt: list[int], **fields: object) -> list[int]:
    return (await client.complete(prompt, **fields)).tokens


@pytest.mark.parametrize("transport", ["ucxx", "nixl"])
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed", marks=pytest.mark.over("ucxx")),
        pytest.param(signal.SIGSTOP, id="hung", marks=pytest.mark.over("nixl")),
    ],
)
async def test_a_lost_prefill_worker_costs_a_retry_and_no_answer(
    make_stack: Callable[..., Stack], model: Path, engine: str, transport: str, number: signal.Signals
) -> None:
    prompts = random_prompts([700] * 12, seed=11)
    expected = reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    stack = make_stack(num_prefill=2, transport=transport, patience="1.5")
    stack.environ |= {broken_steps.ENGINE: engine, broken_steps.PROCESS: number.name}
    with stack:
        victim = stack.services["prefill-0"].process
        async with Client(stack, NUM_NEW_TOKENS) as client:
            await complete(client, prompts[0][:70])  # connections are up
            os.kill(victim.pid or 0, signal.SIGUSR1)  # within a prompt, it is lost
            assert await asyncio.gather(*(complete(client, prompt) for prompt in prompts)) == expected
        assert stack.metric("decode-0", "tandem:recomputes_total", cause="handoff") > 0
        if number is signal.SIGSTOP:
            os.kill(victim.pid or 0, signal.SIGCONT)
        stack.check_clean()


@pytest.mark.on_vllm(slow=True)
async def test_without_any_prefill_worker_prompts_are_prefilled_locally(
    make_stack: Callable[..., Stack], model: Path
) -> None:
    prompts = random_prompts([300] * 3, seed=12)
    expected = reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    with make_stack() as stack:
        stack.services["prefill-0"].process.kill()
        async with Client(stack, NUM_NEW_TOKENS) as client:
            assert await asyncio.gather(*(complete(client, prompt) for prompt in prompts)) == expected
        stack.check_clean()


async def test_a_killed_decode_worker_costs_begun_streams_a_pause_and_no_token(
    make_stack: Callable[..., Stack], model: Path
) -> None:
    prompts = random_prompts([100] * 8, seed=13)
    expected = reference_greedy(model, prompts, NUM_TOKENS_OF_LONG_STREAMS, ignore_eos=True)
    with make_stack(num_decode=2) as stack:
        begun = [asyncio.Event() for _ in prompts]

        async def follow(client: Client, prompt: list[int], has_begun: asyncio.Event) -> list[int]:
            tokens: list[int] = []
            async with client.stream(prompt, max_tokens=NUM_TOKENS_OF_LONG_STREAMS) as chunks:
                async for chunk in chunks:
                    assert "error" not in chunk, chunk
                    for choice in chunk["choices"]:
                        tokens += choice["token_ids"]
                    if tokens:
                        has_begun.set()
            return tokens

        async with Client(stack, NUM_NEW_TOKENS) as client:
            streams = [asyncio.create_task(follow(client, *each)) for each in zip(prompts, begun, strict=True)]
            await asyncio.gather(*(event.wait() for event in begun))  # those of either worker, whoever comes first
            stack.services["decode-0"].process.kill()
            assert await asyncio.gather(*streams) == expected
        assert stack.metric("router", "tandem:router_resumes_total", outcome="resumed", reason="lost") > 0
        stack.check_clean()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_an_engine_that_fails_in_a_step_costs_a_retry_and_no_answer(
    make_stack: Callable[..., Stack], model: Path, engine: str, role: str
) -> None:
    """Its worker ends, so that whoever looks after it starts it anew."""
    prompts = random_prompts([300] * 8, seed=19)
    expected = reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    stack = make_stack(num_prefill=2, num_decode=2)
    stack.environ[broken_steps.ENGINE] = engine
    with stack:
        victim = stack.services[f"{role}-0"]
        async with Client(stack, NUM_NEW_TOKENS) as client:
            os.kill(victim.process.pid or 0, signal.SIGUSR1)
            assert await asyncio.gather(*(complete(client, prompt) for prompt in prompts)) == expected
            await asyncio.to_thread(victim.process.join, 60)
            assert victim.process.exitcode == 1, victim.log
            assert "made up" in victim.log
            stack.restart(victim.name)
            assert await complete(client, prompts[0]) == expected[0]
        stack.check_clean()


@pytest.mark.on_vllm(slow=True)
async def test_redis_gone_serving_goes_on(make_stack: Callable[..., Stack], model: Path) -> None:
    prompts = random_prompts([150] * 2, seed=14)
    expected = reference_greedy(model, prompts, NUM_NEW_TOKENS, ignore_eos=True)
    with make_stack(lease="2") as stack:
        async with Client(stack, NUM_NEW_TOKENS) as client:
            assert await complete(client, prompts[0]) == expected[0]
            stack.redis.close()
            await asyncio.sleep(4.0)  # longer than every lease
            assert await complete(client, prompts[1]) == expected[1]
        stack.check_clean()


async def test_workers_that_do_not_fit_are_refused_by_name(
    make_stack: Callable[..., Stack], model: Path, tmp_path: Path
) -> None:
    prompt = random_prompts([200], seed=15)[0]
    expected = reference_greedy(model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
    misfits = {
        "block_size": "--block-size 64",
        "dtype": "--dtype bfloat16",
        "model_fingerprint": f"--model {write_model(tmp_path / 'other', 'llama3', seed=9, head_dim=32)}",
    }
    stack = make_stack()
    stack.prefill = [f"{stack.prefill[0]} {flags}" for flags in misfits.values()]
    with stack:
        async with Client(stack, NUM_NEW_TOKENS) as client:
            assert await complete(client, prompt) == expected, "the decode worker prefills by itself"
        # The router never pairs them; the handshake refuses them by itself, whoever asks.
        for index, named in enumerate(misfits):
            refusal = await handshake_refusal(stack, f"prefill-{index}")
            assert named in refusal, refusal
        stack.check_clean()


async def handshake_refusal(stack: Stack, prefill_id: str) -> str:
    """What the decode worker says when it is told to take blocks from a prefill worker all the same."""
    from tandem.v1 import worker_pb2 as pb

    records = {record.worker_id: record for record in stack.records()}
    prefill, decode = records[prefill_id], records["decode-0"]
    async with session_with(decode.grpc_address) as session:
        await session.write(pb.SessionRequest(hello=pb.SessionHello(router_id="test", protocol_version="2")))
        target = pb.PrefillTarget(
            worker_id=prefill.worker_id,
            incarnation=prefill.incarnation,
            grpc_address=prefill.grpc_address,
            kv_address=prefill.kv_address,
        )
        sampling = pb.SamplingParams(temperature=0, top_p=1, repetition_penalty=1, max_tokens=2)
        order = pb.GenerateRequest(
            handle=1,
            request_id=f"misfit-{prefill_id}",
            prompt_token_ids=list(range(3, 103)),
            sampling=sampling,
            prefill_targets=[target],
        )
        await session.write(pb.SessionRequest(generate=order))
        async for frame in session:
            if any(output.finish_reason for output in frame.outputs):
                break
        session.cancel()
    warnings = [
        line for line in stack.services["decode-0"].log.splitlines() if f"prefill by {prefill_id} failed" in line
    ]
    lines = [line for line in warnings if f"request_id=misfit-{prefill_id}" in line]
    assert lines, stack.services["decode-0"].log
    return lines[-1]


@pytest.mark.on_vllm(slow=True)
async def test_garbage_on_every_port_harms_nobody(make_stack: Callable[..., Stack], model: Path) -> None:
    prompt = random_prompts([200], seed=16)[0]
    expected = reference_greedy(model, [prompt], NUM_NEW_TOKENS, ignore_eos=True)[0]
    rng = random.Random(1)
    with make_stack() as stack:
        addresses = [
            address
            for record in stack.records()
            for address in (record.grpc_address, record.kv_address, record.http_address)
        ]
        for address in [*addresses, stack.url.removeprefix("http://")] * 3:
            host, port = address.split(":")
            garbage = rng.randbytes(rng.choice([1, 4, 100, 70_000]))
            with (
                socket.create_connection((host, int(port)), timeout=60) as sock,
                contextlib.suppress(ConnectionError),  # who has seen enough of it hangs up
            ):
                sock.sendall(garbage)
        async with Client(stack, NUM_NEW_TOKENS) as client:
            assert await complete(client, prompt) == expected
        stack.check_clean()


@pytest.mark.on_vllm(slow=True)
@pytest.mark.parametrize("by", ["signal", pytest.param("port", marks=pytest.mark.slow)])
async def test_workers_drain_before_they_end(make_stack: Callable[..., Stack], model: Path, by: str) -> None:
    prompts, drained = random_prompts([200] * 6, seed=17), ("prefill-0", "decode-0")
    expected = reference_greedy(model, prompts, NUM_STREAMED_TOKENS, ignore_eos=True)
    with make_stack(num_prefill=2, num_decode=2) as stack:
        workers = [stack.services[name] for name in drained]
        async with Client(stack, NUM_NEW_TOKENS) as client:
            work = [complete(client, prompt, max_tokens=NUM_STREAMED_TOKENS) for prompt in prompts]
            requests = [asyncio.create_task(each) for each in work]
            await until(lambda: stack.metric("decode-0", "vllm:num_requests_running") > 0)
            for worker in workers:
                if by == "signal":
                    worker.process.terminate()
                else:
                    answer = await client.http.post(f"{worker.debug_url}/drain", headers=AUTHORIZATION)
                    assert answer.status_code == 202
            assert await asyncio.gather(*requests) == expected
            if by == "port":
                stack.check_clean()  # these two as well, which are there until their signal
                for worker in workers:
                    worker.process.terminate()
            for worker in workers:
                await asyncio.to_thread(worker.process.join, 60)
                assert worker.process.exitcode == 0, worker.log
            assert await complete(client, prompts[0], max_tokens=NUM_STREAMED_TOKENS) == expected[0]
        stack.check_clean()


async def test_a_drained_decode_workers_streams_go_on_at_another_with_their_kv(
    make_stack: Callable[..., Stack], model: Path
) -> None:
    prompts, length = random_prompts([100, 90, 80], seed=18), NUM_TOKENS_OF_LONG_STREAMS
    bodies = [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 0.9, "seed": 6, "n": 3}]
    asked = [(prompt, {"max_tokens": length, **body}) for prompt, body in zip(prompts, bodies, strict=True)]

    async def follow(client: Client, prompt: list[int], body: dict[str, object], said: dict[int, list[int]]) -> object:
        """The answer's receipt; the tokens of each choice go to `said` as they come."""
        async with client.stream(prompt, **body) as chunks:
            async for chunk in chunks:
                for choice in chunk["choices"]:
                    said.setdefault(choice["index"], []).extend(choice["token_ids"])
        return chunk["receipt"]

    def computed(stack: Stack) -> list[float]:
        return [stack.metric(name, "vllm:prompt_tokens_total") for name in ("prefill-0", "decode-1")]

    with make_stack(num_decode=2) as stack:
        async with Client(stack, NUM_NEW_TOKENS) as client:
            undisturbed: list[dict[int, list[int]]] = [{} for _ in asked]
            for (prompt, body), said in zip(asked, undisturbed, strict=True):
                await follow(client, prompt, body, said)
            drained: list[dict[int, list[int]]] = [{} for _ in asked]
            streams = [
                asyncio.create_task(follow(client, prompt, body, said))
                for (prompt, body), said in zip(asked, drained, strict=True)
            ]
            await until(lambda: sum(len(each) > 20 for said in drained for each in said.values()) == 5)
            num_before = computed(stack)
            process = stack.services["decode-0"].process
            (drained_url,) = [record.http_address for record in stack.records() if record.worker_id == "decode-0"]
            for headers, status in (({}, 401), (AUTHORIZATION, 202)):
                response = await client.http.post(f"http://{drained_url}/drain", headers=headers)
                assert response.status_code == status
            receipts = await asyncio.gather(*streams)
            assert drained == undisturbed
            resumes = [each for receipt in receipts for part in receipt["sequences"] for each in part["resumes"]]  # type: ignore[index]
            assert len(resumes) > 0
            for resume in resumes:
                # Torch computes here: these tokens are the same, and not every model's would be.
                assert (resume["worker_id"], resume["reason"], resume["exact"]) == ("decode-0", "moved", False)
                assert (resume["recomputed_tokens"], resume["moved"]["holder_id"]) == (0, "decode-0")
            assert computed(stack) == num_before
            assert stack.metric("decode-1", "tandem:moved_requests_total", outcome="joined") == len(resumes)
            await until(lambda: stack.debug_state("decode-0")["kept"] == 0)
            assert (await client.http.get(f"http://{drained_url}/ready")).json()["reason"] == "draining"
            stack.check_clean()
            process.terminate()
            await asyncio.to_thread(process.join, 60)
            assert process.exitcode == 0, stack.services["decode-0"].log
