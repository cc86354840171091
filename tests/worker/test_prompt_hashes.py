"""A prompt is hashed once, by the router: workers take its hashes over, and check those of the blocks they publish."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from tandem.v1 import worker_pb2 as pb

from kvstore.block import BlockLayout, hash_blocks, namespace, pack_hashes
from kvstore.block import hash as block_hash
from kvstore.exchange import Outside
from kvstore.threads import OsThreads
from services.cli.embedded_redis import EmbeddedRedis
from services.decode.config import DecodeConfig
from services.decode.service import DecodeService
from services.engine.native import Engine
from services.orders import GrpcOrders
from services.prefill.config import PrefillConfig
from services.prefill.service import PrefillService
from services.worker.assembly import Seams
from services.worker.convert import prompt_hashes
from services.worker.process import open_front, open_worker
from tests.hf_models import random_prompts, write_model
from tests.memory_transport import MemoryTransport, Switchboard
from tests.peers import PROOFS, session_with

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, block_size=16, head_dim=8, dtype="float32", model_fingerprint="f")
PROMPT = list(range(100, 170))  # four full blocks of 16, and a part
HASHES = hash_blocks(namespace("f"), PROMPT, 16)
GIVEN = pb.PromptHashes(root=namespace("f"), block_size=16, hashes=pack_hashes(HASHES))


def changed(**fields: object) -> pb.PromptHashes:
    message = pb.PromptHashes()
    message.CopyFrom(GIVEN)
    message.MergeFrom(pb.PromptHashes(**fields))  # type: ignore[arg-type]
    return message


async def test_hashes_of_our_own_model_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_hash, "_hash_block", None)  # a call would raise
    order = pb.GenerateRequest(prompt_token_ids=PROMPT, prompt_hashes=GIVEN)
    assert await prompt_hashes(order, LAYOUT, OsThreads()) == HASHES


@pytest.mark.parametrize(
    "given",
    [
        pb.PromptHashes(),
        changed(root=namespace("another model")),
        changed(root=namespace("f", "another salt")),
        changed(root=namespace("f", "", "an:adapter")),
        changed(block_size=32),
        changed(hashes=GIVEN.hashes[:-1]),
        changed(hashes=GIVEN.hashes + bytes(16)),
    ],
)
async def test_other_hashes_are_noticed_made_anew_and_passed_on_right(given: pb.PromptHashes) -> None:
    order = pb.GenerateRequest(prompt_token_ids=PROMPT, prompt_hashes=given)
    assert await prompt_hashes(order, LAYOUT, OsThreads()) == HASHES
    assert order.prompt_hashes == GIVEN


async def test_an_adapter_s_blocks_are_not_its_model_s() -> None:
    orders = [pb.PrefillRequest(prompt_token_ids=PROMPT, adapter=key, prompt_hashes=GIVEN) for key in ("a:1", "a:2")]
    made = [await prompt_hashes(order, LAYOUT, OsThreads()) for order in orders]
    assert made == [hash_blocks(namespace("f", "", key), PROMPT, 16) for key in ("a:1", "a:2")]


class Fleet:
    """A prefill and a decode worker in this process, and a session with the latter."""

    def __init__(self, prefill: object, decode: object, session: object) -> None:
        self.prefill, self.decode, self.session = prefill, decode, session

    async def generate(self, prompt: list[int], hashes: pb.PromptHashes | None, handle: int = 1) -> pb.Output:
        record = self.prefill.record  # type: ignore[attr-defined]
        target = pb.PrefillTarget(
            worker_id=record.worker_id,
            incarnation=record.incarnation,
            grpc_address=record.grpc_address,
            kv_address=record.kv_address,
        )
        order = pb.GenerateRequest(
            handle=handle,
            request_id=f"r{handle}",
            prompt_token_ids=prompt,
            sampling=pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=3, ignore_eos=True),
            prefill_targets=[target],
            prompt_hashes=hashes,
        )
        await self.session.write(pb.SessionRequest(generate=order))  # type: ignore[attr-defined]
        async for frame in self.session:  # type: ignore[attr-defined]
            for output in frame.outputs:
                if output.finish_reason:
                    return output
        raise AssertionError("the session ended early")


@pytest.fixture
async def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    torch.set_num_threads(1)
    switchboard = Switchboard()
    monkeypatch.setattr(
        "services.worker.assembly.make_transports", lambda _, memory, *__: [MemoryTransport(memory, switchboard)]
    )
    model = write_model(tmp_path / "model", "llama3")
    async with AsyncExitStack() as stack:
        redis = EmbeddedRedis.start()
        stack.callback(redis.close)
        workers, seams = [], Seams(GrpcOrders(PROOFS.orders), Outside(), time.time, PROOFS.blocks)
        for role, config_class, service in (
            ("prefill", PrefillConfig, PrefillService),
            ("decode", DecodeConfig, DecodeService),
        ):
            config = config_class(model=str(model), redis=redis.url, block_size=16, num_gpu_blocks_override=128)
            engine = Engine.from_config(config)
            front = await stack.enter_async_context(open_front(config, role, PROOFS))
            worker = open_worker(config, role, engine, lambda parts, c=config, s=service: s(c, parts), seams, front)
            workers.append(await stack.enter_async_context(worker))
        session = await stack.enter_async_context(session_with(workers[1].record.grpc_address))
        await session.write(pb.SessionRequest(hello=pb.SessionHello(router_id="test", protocol_version="2")))
        yield Fleet(*workers, session)
        await session.done_writing()


def hashes_for(fleet: Fleet, prompt: list[int]) -> pb.PromptHashes:
    root = namespace(fleet.decode.record.model_fingerprint)
    return pb.PromptHashes(root=root, block_size=16, hashes=pack_hashes(hash_blocks(root, prompt, 16)))


async def test_workers_hash_no_prompt_but_what_they_publish(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    with_hashes, without = random_prompts([100, 100])  # six full blocks of 16, and a part
    given = hashes_for(fleet, with_hashes)
    counted: Counter[bytes] = Counter()
    original = block_hash._hash_block

    def count(parent: bytes, encoded: bytes) -> block_hash.BlockHash:
        counted[encoded] += 1
        return original(parent, encoded)

    monkeypatch.setattr(block_hash, "_hash_block", count)
    output = await fleet.generate(with_hashes, given)
    assert output.usage.num_transferred_blocks == 7
    # Each of the two checked what it published.
    assert (len(counted), set(counted.values())) == (6, {2})
    counted.clear()
    output = await fleet.generate(without, None, handle=2)
    assert output.usage.num_transferred_blocks == 7
    # The decode worker made them and gave them on, so it is once more.
    assert (len(counted), set(counted.values())) == (6, {3})


async def test_a_wrong_hash_serves_its_own_request_and_is_never_published(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    mine, theirs = random_prompts([100, 100])
    wrong = hashes_for(fleet, theirs)
    output = await fleet.generate(mine, wrong)
    assert output.finish_reason == pb.FINISH_REASON_LENGTH
    assert "came with a wrong hash of block 0: nothing of it is published" in caplog.text
    for worker in (fleet.prefill, fleet.decode):
        assert len(worker.parts.engine.pool) == 0
    output = await fleet.generate(theirs, wrong, handle=2)
    assert (output.usage.num_cached_tokens, output.usage.num_transferred_blocks) == (0, 7)
