"""A prompt without a token goes on elsewhere, or here: same tokens, each full block computed once, all freed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tandem.v1 import worker_pb2 as pb

from kvstore.exchange import Fetch
from services.decode.redirecting import Course, Redirected, source_of
from services.engine.api import StepOutput
from services.orders import REDIRECTS
from tests.hf_models import random_prompts, write_model
from tests.waiting import until
from tests.worker.decode_worker import Answer, RouterOf, ended
from tests.worker.elastic_worker import ElasticWorker
from tests.worker.test_elastic import fleet, order, tokens_of

PROMPT = random_prompts([300], seed=9)[0]
CHUNK, BLOCK = 64, 16
SETTINGS: dict[str, object] = {"max_num_batched_tokens": CHUNK, "prefix_fetch": "always"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("models") / "llama3", "llama3", seed=3)


class Held:
    """Counts the prompt tokens that a worker computes, and lets it take so many steps, and further ones when told."""

    def __init__(self, worker: ElasticWorker, router: RouterOf) -> None:
        self.worker, self.router = worker, router
        self.num_tokens = 0
        self.steps_left = 1 << 30
        self.fetches: list[Fetch] = []
        engine, exchange = worker.parts.engine, worker.parts.exchange
        step, fetch = engine.step, exchange.fetch

        def held_step(*args: Any) -> StepOutput:
            if not self.steps_left:
                return StepOutput()
            output = step(*args)
            self.steps_left -= 1
            self.num_tokens += output.shape.num_prompt_tokens
            return output

        def noted_fetch(*args: Any, **of_prefix: Any) -> Fetch:
            begun = fetch(*args, **of_prefix)
            if not of_prefix:
                self.fetches.append(begun)
            return begun

        engine.step = held_step  # type: ignore[method-assign]
        exchange.fetch = noted_fetch  # type: ignore[method-assign]

    def hold(self, num_steps: int) -> None:
        self.num_tokens, self.steps_left = 0, num_steps

    def release(self) -> None:
        self.steps_left = 1 << 30
        self.worker.parts.thread.post(lambda: None)

    async def computed(self, num_tokens: int) -> None:
        await until(lambda: self.num_tokens >= num_tokens)

    def redirect(self, handle: int, *targets: Held) -> None:
        message = pb.RedirectRequest(handle=handle, prefill_targets=[each.worker.target for each in targets])
        self.router.tell(pb.SessionRequest(redirect=message))


@asynccontextmanager
async def held_workers(model: Path, number: int = 2, **settings: object) -> AsyncIterator[list[Held]]:
    async with fleet(model, number, **{**SETTINGS, **settings}) as workers:
        yield [Held(worker, router) for worker, router in workers]


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[int]:
    return asyncio.run(tokens_of(model, [PROMPT]))[0]


async def checked(answer: Answer, wanted: list[int], **facts: object) -> pb.Usage:
    usage = (await ended(answer)).usage
    assert answer.token_ids == wanted
    assert {name: getattr(usage, name) for name in facts} == facts
    return usage


@pytest.mark.parametrize("num_steps", [0, 2])
async def test_a_prompt_that_waits_or_is_computed_here_goes_on_elsewhere(
    model: Path, wanted: list[int], num_steps: int
) -> None:
    async with held_workers(model) as (a, b):
        a.hold(num_steps)
        answer = a.router.generate(order(1, PROMPT))
        await until(lambda: a.worker.parts.engine.load().num_waiting + a.worker.parts.engine.load().num_running)
        await a.computed(num_steps * CHUNK)
        a.redirect(1, b)
        await until(lambda: b.num_tokens)
        a.release()
        usage = await checked(
            answer, wanted, prefilled_locally=False, prefill_worker_id="elastic-1", num_redirects=1, num_cached_tokens=0
        )
        assert b.num_tokens == len(PROMPT) - num_steps * CHUNK
        assert sum(part.num_blocks for part in usage.fetched) == num_steps * CHUNK // BLOCK
        assert a.worker.metric("tandem:redirects_total", goal="elsewhere") == 1


@pytest.mark.parametrize("num_steps", [0, 2])
async def test_a_prompt_that_was_ordered_elsewhere_is_computed_here(
    model: Path, wanted: list[int], num_steps: int
) -> None:
    async with held_workers(model) as (a, b):
        b.hold(num_steps)
        answer = a.router.generate(order(1, PROMPT, b.worker))
        await until(lambda: b.worker.state["orders"] and a.fetches)
        await until(lambda: a.fetches[0].num_announced == num_steps * CHUNK // BLOCK)
        a.hold(1 << 30)
        a.redirect(1)
        usage = await checked(
            answer, wanted, prefilled_locally=True, prefill_worker_id="", num_redirects=1, num_cached_tokens=0
        )
        assert a.num_tokens == len(PROMPT) - num_steps * CHUNK
        assert [(part.holder_id, part.num_blocks) for part in usage.fetched] == (
            [("elastic-1", num_steps * CHUNK // BLOCK)] if num_steps else []
        )
        await until(lambda: not b.worker.state["orders"])
        assert b.num_tokens == num_steps * CHUNK
        assert a.worker.metric("tandem:redirects_total", goal="here") == 1


async def test_a_prompt_goes_from_one_worker_to_the_next_and_comes_back(model: Path, wanted: list[int]) -> None:
    """A chunk is computed by each of three in turn: two prefill for it, then it itself; the rest by the first."""
    async with held_workers(model, 3) as (a, b, c):
        b.hold(1)
        answer = a.router.generate(order(1, PROMPT, b.worker))
        await until(lambda: a.fetches and a.fetches[0].num_announced == CHUNK // BLOCK)
        c.hold(1)
        a.redirect(1, c)
        await until(lambda: len(a.fetches) == 2 and a.fetches[1].num_announced == 2 * CHUNK // BLOCK)
        a.hold(1)
        a.redirect(1)
        await a.computed(CHUNK)
        b.hold(1 << 30)
        a.redirect(1, b)
        await b.computed(CHUNK)
        a.release()
        await checked(answer, wanted, num_redirects=3, num_cached_tokens=0, prefill_worker_id="elastic-1")
        assert (b.num_tokens, c.num_tokens) == (len(PROMPT) - 3 * CHUNK, CHUNK)


async def test_what_a_worker_had_before_counts_as_cached_behind_a_redirection(model: Path, wanted: list[int]) -> None:
    async with held_workers(model) as (a, b):
        await ended(a.router.generate(order(1, [*PROMPT[:160], 5, 6, 7])))
        a.hold(1)
        answer = a.router.generate(order(2, PROMPT))
        await a.computed(CHUNK)
        a.redirect(2, b)
        await until(lambda: b.num_tokens)
        a.release()
        usage = await checked(answer, wanted, num_redirects=1, num_cached_tokens=160)
        assert [(part.holder_id, part.num_blocks) for part in usage.fetched] == [("elastic-0", 14)]
        assert b.num_tokens == len(PROMPT) - 160 - CHUNK


async def test_a_redirection_to_where_it_is_or_of_nobody_changes_nothing(model: Path, wanted: list[int]) -> None:
    async with held_workers(model) as (a, b):
        b.hold(1)
        answer = a.router.generate(order(1, PROMPT, b.worker))
        await until(lambda: a.fetches and a.fetches[0].num_announced)
        a.redirect(1, b)
        a.redirect(7, b)
        a.redirect(1, b, a)
        b.release()
        await checked(answer, wanted, num_redirects=0, prefill_worker_id="elastic-1", prefilled_locally=False)
        assert len(a.fetches) == 1


async def test_two_redirections_one_behind_the_other_are_the_latter(model: Path, wanted: list[int]) -> None:
    async with held_workers(model, 3) as (a, b, c):
        a.hold(1)
        answer = a.router.generate(order(1, PROMPT))
        await a.computed(CHUNK)
        a.redirect(1, b)
        a.redirect(1, b)
        a.redirect(1, c)
        await until(lambda: c.num_tokens)
        a.release()
        await checked(answer, wanted, num_redirects=1, prefill_worker_id="elastic-2")
        assert b.num_tokens == 0


async def test_a_redirection_behind_the_first_token_comes_too_late(model: Path, wanted: list[int]) -> None:
    async with held_workers(model) as (a, b):
        answer = a.router.generate(order(1, PROMPT))
        await until(lambda: answer.token_ids)
        a.redirect(1, b)
        await checked(answer, wanted, num_redirects=0, prefilled_locally=True)
        a.redirect(1, b)
        assert b.worker.num_orders == 0


async def test_a_redirection_that_fails_leads_to_the_next_target_and_then_here(model: Path, wanted: list[int]) -> None:
    async with held_workers(model) as (a, b):
        a.hold(2)
        answer = a.router.generate(order(1, PROMPT))
        await a.computed(2 * CHUNK)
        gone = pb.PrefillTarget(worker_id="gone", incarnation="x", grpc_address="gone", kv_address="127.0.0.1:1")
        a.router.tell(pb.SessionRequest(redirect=pb.RedirectRequest(handle=1, prefill_targets=[gone])))
        await until(lambda: a.worker.metric("tandem:handoff_failures_total", cause="unreachable"))
        a.hold(1 << 30)
        a.release()
        await checked(answer, wanted, prefilled_locally=True, num_recomputes=1, num_cached_tokens=0)
        assert a.num_tokens == len(PROMPT) - 2 * CHUNK
        assert b.num_tokens == 0


async def test_an_abort_while_a_redirection_is_under_way_leaves_nothing(model: Path) -> None:
    async with held_workers(model) as (a, b):
        a.hold(1)
        answers = [a.router.generate(order(handle, PROMPT)) for handle in (1, 2)]
        await a.computed(CHUNK)
        for handle in (1, 2):
            a.redirect(handle, b)
        a.router.abort(1)
        await until(lambda: b.worker.state["orders"])
        a.router.abort(2)
        for answer in answers:
            assert (await ended(answer)).finish_reason == pb.FINISH_REASON_ABORT


async def test_a_session_says_that_its_worker_knows_redirections(model: Path) -> None:
    async with held_workers(model) as (a, _):
        frames: list[pb.SessionFrame] = []

        async def take(frame: pb.SessionFrame) -> None:
            frames.append(frame)

        session = asyncio.create_task(a.worker.serve_session(RouterOf().orders(), take))
        await until(lambda: frames)
        session.cancel()
        assert REDIRECTS in frames[0].features


# ---- the stretch that a redirection ends ------------------------------------------


def aimed(course: Course, *workers: str) -> None:
    course.asked = pb.RedirectRequest(prefill_targets=[pb.PrefillTarget(worker_id=name) for name in workers])
    course.aim(pb.GenerateRequest(), "self")


async def test_a_redirection_and_an_abort_in_one_moment_are_an_abort() -> None:
    course, begun = Course(), asyncio.Event()

    async def admission() -> None:
        with course.open():
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(admission())
    await begun.wait()
    aimed(course, "x")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_two_redirections_in_one_moment_end_a_stretch_once() -> None:
    course, begun = Course(), asyncio.Event()

    async def admission() -> int:
        try:
            with course.open():
                begun.set()
                await asyncio.Event().wait()
        except Redirected:
            await asyncio.sleep(0)
        task = asyncio.current_task()
        return -1 if task is None else task.cancelling()

    task = asyncio.create_task(admission())
    await begun.wait()
    aimed(course, "x")
    aimed(course, "y")
    assert await task == 0
    assert not course.is_late
    assert course.wants_no_change(course.asked, "self")


async def test_a_stretch_that_breaks_as_it_is_ended_has_the_redirection_told_again() -> None:
    course, begun = Course(), asyncio.Event()

    async def admission() -> None:
        with course.open():
            try:
                begun.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("broken") from None

    task = asyncio.create_task(admission())
    await begun.wait()
    aimed(course, "x")
    with pytest.raises(ValueError, match="broken"):
        await task
    assert course.is_late
    assert task.cancelling() == 0


def test_blocks_of_unknown_holders_are_cached_ones() -> None:
    course = Course()
    course.ends_at(source_of(pb.PrefillTarget(worker_id="x"), 4))
    course.came("z", [pb.FetchedPrefix(holder_id=name, num_blocks=4) for name in ("x", "y")])
    assert course.num_computed_blocks == 4
