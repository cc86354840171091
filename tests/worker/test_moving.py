"""A live request goes from one decode worker to another with its KV: same tokens, nothing computed twice, all freed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from tandem.v1 import worker_pb2 as pb

from services.engine.api import NotReserved
from tests.hf_models import random_prompts, write_model
from tests.memory_transport import Faults, Switchboard
from tests.waiting import until
from tests.worker.decode_worker import Answer, DecodeWorker, RouterOf, ended, running

LENGTH = 60
SAMPLINGS: dict[str, dict[str, object]] = {
    "greedy": {},
    "drawn": {"temperature": 1.5, "seed": 7, "top_k": 40},
    "penalized": {"frequency_penalty": 0.7, "repetition_penalty": 1.3, "logprobs": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("models") / "llama3", "llama3", seed=3)


def order(handle: int, prompt: list[int], **sampling: object) -> pb.GenerateRequest:
    chosen: dict[str, object] = {"top_p": 1, "repetition_penalty": 1, "max_tokens": LENGTH, "ignore_eos": True}
    return pb.GenerateRequest(
        handle=handle,
        request_id=f"r{handle}",
        prompt_token_ids=prompt,
        sampling=pb.SamplingParams(**{**chosen, **sampling}),  # type: ignore[arg-type]
    )


def go_on(begun: pb.GenerateRequest, so_far: Answer, from_worker: DecodeWorker) -> pb.GenerateRequest:
    """The order as a router sends it to the next worker."""
    assert so_far.last is not None
    assert so_far.last.finish_reason == pb.FINISH_REASON_MOVED
    order = pb.GenerateRequest()
    order.CopyFrom(begun)
    order.resumed_token_ids.extend(so_far.token_ids)
    order.move.CopyFrom(so_far.last.move)
    order.move.kv_address = from_worker.parts.exchange.address
    return order


async def has_said(answer: Answer, num_tokens: int) -> None:
    await until(lambda: len(answer.token_ids) >= num_tokens or answer.last is not None)


async def move_after(router: RouterOf, answer: Answer, handle: int, num_tokens: int) -> pb.Output:
    await has_said(answer, num_tokens)
    router.move(handle)
    return await ended(answer)


@asynccontextmanager
async def two_workers(
    model: Path, *faults: Faults
) -> AsyncIterator[tuple[DecodeWorker, DecodeWorker, RouterOf, RouterOf, Answer, pb.GenerateRequest]]:
    """Two workers, a router's session with each, what the first one answers undisturbed, and the same order anew.

    `faults` are those of what the second one reads.
    """
    switchboard, (prompt,) = Switchboard(), random_prompts([37], seed=5)
    first, second = DecodeWorker("decode-0", model, switchboard), DecodeWorker("decode-1", model, switchboard, *faults)
    async with running(first, second) as (here, there):
        whole = here.generate(order(1, prompt))
        await ended(whole)
        yield first, second, here, there, whole, order(2, prompt)


@pytest.mark.parametrize("sampling", list(SAMPLINGS))
async def test_wherever_it_is_moved_the_tokens_go_on_and_nothing_is_computed_again(model: Path, sampling: str) -> None:
    switchboard, (prompt,) = Switchboard(), random_prompts([37], seed=1)
    first, second = DecodeWorker("decode-0", model, switchboard), DecodeWorker("decode-1", model, switchboard)
    async with running(first, second) as (here, there):
        whole = here.generate(order(1, prompt, **SAMPLINGS[sampling]))
        await ended(whole)
        moved_at = set()
        for handle in range(2, 26, 2):
            begun = order(handle, prompt, **SAMPLINGS[sampling])
            head = here.generate(begun)
            last = await move_after(here, head, handle, 2 * handle)
            assert last.move.num_tokens == len(prompt) + len(head.token_ids) - 1
            moved_at.add(last.move.num_tokens % 16)
            tail = there.generate(go_on(begun, head, first))
            end = await ended(tail)
            assert end.finish_reason == pb.FINISH_REASON_LENGTH
            assert head.token_ids + tail.token_ids == whole.token_ids
            found = [each.chosen.token_id for each in [*head.logprobs, *tail.logprobs]]
            assert found == [each.chosen.token_id for each in whole.logprobs]
            assert end.usage.moved.num_blocks <= -(-last.move.num_tokens // 16)
            assert end.usage.num_recomputes == 0
        assert len(moved_at) > 4, "last blocks of hardly any length"
        assert second.parts.engine.stats.num_prompt_tokens == 0
        await until(lambda: first.num_free == first.parts.engine.capabilities.num_blocks)


async def test_a_request_that_waits_leaves_without_blocks_and_one_in_its_prefill_leaves_after_it(model: Path) -> None:
    switchboard, prompts = Switchboard(), random_prompts([90, 50], seed=2)
    first = DecodeWorker("decode-0", model, switchboard, max_num_seqs=1, max_num_batched_tokens=16)
    second = DecodeWorker("decode-1", model, switchboard)
    async with running(first, second) as (here, there):
        begun = [order(handle, prompt) for handle, prompt in enumerate(prompts)]
        heads = [here.generate(each) for each in begun]
        await until(lambda: first.parts.engine.load().num_running)
        for each in begun:
            here.move(each.handle)
        lasts = [await ended(head) for head in heads]
        assert [last.HasField("move") for last in lasts] == [True, False]
        assert (len(heads[0].token_ids) > 0, len(heads[1].token_ids)) == (True, 0)
        tails = [there.generate(go_on(each, head, first)) for each, head in zip(begun, heads, strict=True)]
        for tail in tails:
            await ended(tail)
        whole = [second_answer(head, tail) for head, tail in zip(heads, tails, strict=True)]
        assert list(map(len, whole)) == [LENGTH, LENGTH]
        assert second.parts.engine.stats.num_prompt_tokens == len(prompts[1])


def second_answer(head: Answer, tail: Answer) -> list[int]:
    return head.token_ids + tail.token_ids


async def test_an_abort_while_it_leaves_frees_all(model: Path) -> None:
    first = DecodeWorker("decode-0", model, Switchboard())
    async with running(first) as (here,):
        for handle in range(8):
            answer = here.generate(order(handle, random_prompts([40], seed=3)[0]))
            await has_said(answer, 3)
            here.move(handle)
            for _ in range(handle):
                await asyncio.sleep(0)
            here.abort(handle)
            assert (await ended(answer)).finish_reason in (pb.FINISH_REASON_ABORT, pb.FINISH_REASON_MOVED)


@pytest.mark.parametrize("gone", ["taker", "taker's request", "giver"])
async def test_whoever_goes_while_blocks_are_read_nothing_is_held_and_the_answer_is_right(
    model: Path, gone: str
) -> None:
    async with two_workers(model, Faults(stall=1.0)) as (first, second, here, there, whole, begun):
        head = here.generate(begun)
        await move_after(here, head, 2, 20)
        tail = there.generate(go_on(begun, head, first))
        await until(lambda: any(fetch["state"] == "read" for fetch in second.parts.exchange.state()["fetches"]))  # type: ignore[attr-defined]
        if gone == "taker":
            await second.parts.exchange.close()
        elif gone == "giver":
            await first.parts.exchange.close()
        else:
            there.abort(2)
        last = await ended(tail)
        if gone != "taker's request":
            assert last.finish_reason == pb.FINISH_REASON_LENGTH
            assert head.token_ids + tail.token_ids == whole.token_ids
            assert (last.usage.num_recomputes, last.usage.HasField("moved")) == (1, False)
        await until(lambda: first.num_free == first.parts.engine.capabilities.num_blocks)


async def test_an_order_that_comes_again_while_its_blocks_are_read_still_is_computed_and_no_error(model: Path) -> None:
    """As after a break of the router's session: it goes back to the worker that it had sent the move to."""
    async with two_workers(model, Faults(stall=1.0)) as (first, second, here, there, whole, begun):
        head = here.generate(begun)
        await move_after(here, head, 2, 20)
        again = go_on(begun, head, first)
        there.generate(again)
        await until(lambda: any(fetch["state"] == "read" for fetch in second.parts.exchange.state()["fetches"]))  # type: ignore[attr-defined]
        there.abort(2)
        again.handle = 3
        tail = there.generate(again)
        last = await ended(tail)
        assert last.finish_reason == pb.FINISH_REASON_LENGTH
        assert head.token_ids + tail.token_ids == whole.token_ids
        assert last.usage.num_recomputes == 1


async def test_a_worker_that_drains_takes_what_has_begun_and_nothing_new(model: Path) -> None:
    async with two_workers(model) as (first, second, here, there, whole, begun):
        head = here.generate(begun)
        await move_after(here, head, 2, 20)
        drains = [asyncio.create_task(worker.service.drain(60)) for worker in (first, second)]
        await until(lambda: second.service.state()["draining"])
        refused = there.generate(order(1, list(begun.prompt_token_ids)))
        assert (await ended(refused)).error.code == pb.ERROR_CODE_UNAVAILABLE
        came_back = go_on(begun, head, first)
        came_back.ClearField("move")
        tails = [here.generate(came_back), there.generate(go_on(begun, head, first))]
        for tail in tails:
            await ended(tail)
            assert head.token_ids + tail.token_ids == whole.token_ids
        await asyncio.gather(*drains)


async def test_blocks_of_another_length_than_the_output_are_not_used(model: Path) -> None:
    async with two_workers(model) as (first, second, here, there, whole, begun):
        head = here.generate(begun)
        await move_after(here, head, 2, 20)
        head.token_ids.pop()
        tail = there.generate(go_on(begun, head, first))
        await ended(tail)
        assert head.token_ids + tail.token_ids == whole.token_ids
        assert second.parts.engine.stats.num_prompt_tokens > 0


async def test_blocks_that_the_new_workers_engine_does_not_take_cost_a_computation_and_no_answer(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise NotReserved("it has no place")

    async with two_workers(model) as (first, second, here, there, whole, begun):
        head = here.generate(begun)
        await move_after(here, head, 2, 20)
        monkeypatch.setattr(second.parts.engine, "add_prefilled", refuse)
        tail = there.generate(go_on(begun, head, first))
        last = await ended(tail)
        assert last.finish_reason == pb.FINISH_REASON_LENGTH
        assert head.token_ids + tail.token_ids == whole.token_ids
        assert (last.usage.num_recomputes, last.usage.HasField("moved")) == (1, False)


async def test_blocks_that_cannot_be_kept_are_freed_and_the_request_goes_on_without_them(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*_: object) -> None:
        raise RuntimeError("a bug")

    async with two_workers(model) as (first, _, here, there, whole, begun):
        monkeypatch.setattr(first.parts.exchange, "keep", break_off)
        head = here.generate(begun)
        last = await move_after(here, head, 2, 20)
        assert not last.HasField("move")
        tail = there.generate(go_on(begun, head, first))
        await ended(tail)
        assert head.token_ids + tail.token_ids == whole.token_ids
        await until(lambda: first.num_free == first.parts.engine.capabilities.num_blocks)


async def test_a_drain_whose_time_is_up_ends_what_found_no_room_elsewhere_so_that_it_goes_on_there(model: Path) -> None:
    worker = DecodeWorker("decode-0", model, Switchboard())
    async with running(worker) as (here,):
        answer = here.generate(order(1, random_prompts([37])[0], max_tokens=350))
        await has_said(answer, 3)
        await worker.service.drain(0.0)
        last = await ended(answer)
        assert last.error.code == pb.ERROR_CODE_UNAVAILABLE
        assert "drains" in last.error.message
        assert len(answer.token_ids) < 350
