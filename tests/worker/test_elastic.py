"""Two elastic workers: each prefills for the other, decodes, and comes to an end, whatever the other half does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tandem.v1 import worker_pb2 as pb

from services.elastic.config import ElasticConfig
from services.worker.assembly import exchange_timeouts
from tests.hf_models import random_prompts, write_model
from tests.memory_orders import MemoryOrders
from tests.memory_transport import Switchboard
from tests.waiting import until
from tests.worker.decode_worker import RouterOf, ended, running
from tests.worker.elastic_worker import ElasticWorker

LENGTH = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("models") / "llama3", "llama3", seed=3)


class Pair(NamedTuple):
    """Two workers and a router's session with each."""

    a: ElasticWorker
    b: ElasticWorker
    at_a: RouterOf
    at_b: RouterOf


@asynccontextmanager
async def fleet(model: Path, number: int, **settings: object) -> AsyncIterator[list[tuple[ElasticWorker, RouterOf]]]:
    """So many workers, and a router's session with each."""
    switchboard, orders = Switchboard(), MemoryOrders()
    workers = [ElasticWorker(f"elastic-{index}", model, switchboard, orders, **settings) for index in range(number)]
    async with running(*workers) as routers:
        yield list(zip(workers, routers, strict=True))


@asynccontextmanager
async def pair(model: Path, **settings: object) -> AsyncIterator[Pair]:
    async with fleet(model, 2, **settings) as ((a, at_a), (b, at_b)):
        yield Pair(a, b, at_a, at_b)


def order(handle: int, prompt: list[int], *prefill: ElasticWorker, **sampling: object) -> pb.GenerateRequest:
    chosen: dict[str, object] = {"top_p": 1, "repetition_penalty": 1, "max_tokens": LENGTH, "ignore_eos": True}
    return pb.GenerateRequest(
        handle=handle,
        request_id=f"r{handle}",
        prompt_token_ids=prompt,
        sampling=pb.SamplingParams(**{**chosen, **sampling}),  # type: ignore[arg-type]
        prefill_targets=[worker.target for worker in prefill],
    )


async def tokens_of(model: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What each prompt is answered with by a worker that computes all of it."""
    async with pair(model) as (_, _, at_a, _):
        answers = [at_a.generate(order(number, prompt)) for number, prompt in enumerate(prompts)]
        for answer in answers:
            await ended(answer)
    return [answer.token_ids for answer in answers]


async def test_two_workers_prefill_for_each_other_at_the_same_time(model: Path) -> None:
    prompts = random_prompts([100, 150, 90, 130], seed=2)
    wanted = await tokens_of(model, prompts)
    async with pair(model) as (a, b, at_a, at_b):
        handed = [at_a.generate(order(1, prompts[0], b)), at_b.generate(order(1, prompts[1], a))]
        own = [at_a.generate(order(2, prompts[2])), at_b.generate(order(2, prompts[3]))]
        last = [await ended(answer) for answer in (*handed, *own)]
        assert [answer.token_ids for answer in (*handed, *own)] == wanted
        assert [output.usage.prefill_worker_id for output in last[:2]] == ["elastic-1", "elastic-0"]
        assert all(output.usage.num_transferred_blocks for output in last[:2])
        assert all(output.usage.prefilled_locally for output in last[2:])
        assert (a.num_orders, b.num_orders) == (1, 1)


async def test_a_prompt_for_itself_is_computed_and_not_ordered(model: Path) -> None:
    prompts = random_prompts([100], seed=2)
    wanted = await tokens_of(model, prompts)
    async with pair(model) as (a, b, at_a, _):
        answer = at_a.generate(order(1, prompts[0], a, b))
        usage = (await ended(answer)).usage
        assert (answer.token_ids, usage.prefilled_locally, a.num_orders, b.num_orders) == (wanted[0], True, 0, 0)


async def test_a_worker_behind_one_that_is_gone_may_be_itself(model: Path) -> None:
    prompts = random_prompts([100], seed=2)
    async with pair(model) as (a, b, at_a, _):
        gone = pb.PrefillTarget(worker_id="gone", incarnation="x", grpc_address="gone", kv_address="127.0.0.1:1")
        begun = order(1, prompts[0], a, b)
        begun.prefill_targets.insert(0, gone)
        usage = (await ended(at_a.generate(begun))).usage
        assert (usage.prefilled_locally, usage.num_recomputes, b.num_orders) == (True, 1, 0)


async def test_a_drain_refuses_what_is_new_and_lets_both_halves_come_to_their_end(model: Path) -> None:
    prompts = random_prompts([100, 150], seed=2)
    async with pair(model) as (a, _, at_a, at_b):
        own = at_a.generate(order(1, prompts[0], max_tokens=200))
        await until(lambda: len(own.token_ids) > 2)
        draining = asyncio.create_task(a.service.drain(60))
        await until(lambda: a.state["draining"] is True)
        refused = at_b.generate(order(1, prompts[1], a))
        usage = (await ended(refused)).usage
        assert (usage.prefilled_locally, usage.num_recomputes) == (True, 1)
        refusal = (await ended(at_a.generate(order(2, prompts[1])))).error
        assert refusal.code == pb.ERROR_CODE_UNAVAILABLE
        assert not draining.done()
        at_a.move(1)
        assert (await ended(own)).finish_reason == pb.FINISH_REASON_MOVED
        assert not draining.done(), "what was left is kept for whoever goes on with it"
        moved = order(3, prompts[0], max_tokens=200)
        moved.resumed_token_ids.extend(own.token_ids)
        assert own.last is not None
        moved.move.CopyFrom(own.last.move)
        moved.move.kv_address = a.parts.exchange.address
        goes_on = at_b.generate(moved)
        await draining
        assert (await ended(goes_on)).usage.moved.num_blocks > 0


async def test_two_workers_full_of_what_the_other_is_to_read_give_way(model: Path) -> None:
    """Each pool has 25 blocks; two prompts that were computed for the other take 2 x 10, and each needs 10 there."""
    prompts = random_prompts([150] * 8, seed=4)
    wanted = await tokens_of(model, prompts)
    async with pair(model, num_gpu_blocks_override=25, handoff_timeout_s=0.3) as (a, b, at_a, at_b):
        answers = [at_a.generate(order(number, prompt, b)) for number, prompt in enumerate(prompts[:4])]
        answers += [at_b.generate(order(number, prompt, a)) for number, prompt in enumerate(prompts[4:])]
        for answer in answers:
            await ended(answer)
        assert [answer.token_ids for answer in answers] == wanted


def test_a_prompt_waits_no_longer_for_room_than_its_blocks_may_be_in_the_way() -> None:
    timeouts = exchange_timeouts(ElasticConfig(model="m"))
    assert timeouts.reserve_s < timeouts.read_s
    assert exchange_timeouts(ElasticConfig(model="m", handoff_timeout_s=2)).reserve_s == 2
    assert exchange_timeouts(ElasticConfig(model="m", lease_ttl_s=7)).lease_ttl_s == 7
