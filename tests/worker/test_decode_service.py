"""A decode worker's requests: whatever becomes of one, its router hears of its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tandem.v1 import worker_pb2 as pb

from services.decode.config import DecodeConfig
from services.decode.news import News, news_of_step
from services.decode.service import DecodeService
from services.decode.session import RouterSession
from services.decode.stages import LiveState
from services.engine.api import (
    FinishReason,
    InvalidRequest,
    PositionLogprobs,
    Request,
    RequestUpdate,
    SampledToken,
    SamplingParams,
    TokenLogprob,
)
from services.orders import StreamRefused
from services.rates import RateLearner
from tests.loop_threads import LoopThreads


class MetricsOfTheTest:
    """Counts nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class ThreadOfTheTest:
    """An engine's thread that runs nothing."""

    is_behind = False

    def post(self, *_: object) -> None: ...


class RouterOfTheTest:
    """A session in which one request is ordered."""

    def __init__(self, order: pb.GenerateRequest) -> None:
        self._order = order
        self.outputs: asyncio.Queue[pb.Output] = asyncio.Queue()

    async def orders(self) -> AsyncIterator[pb.SessionRequest]:
        yield pb.SessionRequest(hello=pb.SessionHello(router_id="router", protocol_version="2"))
        yield pb.SessionRequest(generate=self._order)
        await asyncio.get_running_loop().create_future()

    async def send(self, frame: pb.SessionFrame) -> None:
        for output in frame.outputs:
            self.outputs.put_nowait(output)


async def last_output(order: pb.GenerateRequest, **parts: object) -> pb.Output:
    """What a router hears of one order from a decode worker of these parts."""
    common = {
        "worker_id": "decode-0",
        "incarnation": "1",
        "thread": ThreadOfTheTest(),
        "threads": LoopThreads(),
        "clock": time.time,
    }
    others = SimpleNamespace(**common, **parts, metrics=MetricsOfTheTest(), rates=RateLearner())
    service = DecodeService(DecodeConfig(model="model"), others)  # type: ignore[arg-type]
    service._load = pb.Load  # type: ignore[method-assign]
    router = RouterOfTheTest(order)
    session = asyncio.create_task(service.serve_session(router.orders(), router.send))  # type: ignore[arg-type]
    async with asyncio.timeout(60):
        output = await router.outputs.get()
        await service.drain(1)
        session.cancel()
        await asyncio.wait([session])
    return output


def order(**fields: object) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=1)
    return pb.GenerateRequest(
        handle=1, request_id="r", prompt_token_ids=range(40), sampling=sampling, timeout_s=600, **fields
    )


def engine(check: Callable[[object], None] = lambda request: None) -> SimpleNamespace:
    layout = SimpleNamespace(model_fingerprint="model", block_size=16)
    return SimpleNamespace(
        capabilities=SimpleNamespace(max_num_seqs=64), layout=layout, check=check, peek_prefix=lambda hashes: 0
    )


async def test_a_router_of_another_version_is_refused_before_it_could_lose_tokens() -> None:
    async def orders() -> AsyncIterator[pb.SessionRequest]:
        yield pb.SessionRequest(hello=pb.SessionHello(router_id="old", protocol_version="1"))

    parts = SimpleNamespace(worker_id="decode-0", metrics=MetricsOfTheTest(), rates=RateLearner(), clock=time.time)
    service = DecodeService(DecodeConfig(model="model"), parts)  # type: ignore[arg-type]
    with pytest.raises(StreamRefused, match="session protocol '1'; this decode worker speaks '2'"):
        await service.serve_session(orders(), None)  # type: ignore[arg-type]


def test_only_first_last_and_log_probabilities_are_outputs_and_usage_is_in_none() -> None:
    request = Request("r", [1, 2], SamplingParams(max_tokens=9))
    live: Any = SimpleNamespace(order=order())

    def said(token: SampledToken, num_outputs: int, finish_reason: FinishReason | None = None) -> tuple[object, ...]:
        counts = {"num_output_tokens": num_outputs, "num_cached_tokens": 2, "num_preemptions": 3}
        (news,) = news_of_step(live, RequestUpdate(request, 3, (token,), finish_reason, **counts))
        output = news.output
        if output is None:
            return ("row", news.token_id)
        assert not output.HasField("usage")
        return (list(output.token_ids), len(output.logprobs), news.num_cached_tokens, news.num_recomputes)

    assert said(SampledToken(5), 1) == ([5], 0, 2, 0)
    assert said(SampledToken(6), 2) == ("row", 6)
    with_logprobs = SampledToken(6, PositionLogprobs(TokenLogprob(6, -1.0, 1), ()))
    assert said(with_logprobs, 2) == ([6], 1, 2, 0)
    assert said(SampledToken(6), 2, FinishReason.LENGTH) == ([6], 0, 2, 3)
    live.order.resumed_token_ids.extend([3, 4])
    assert said(SampledToken(5), 3) == ([5], 0, 2, 0)
    assert said(SampledToken(6), 4) == ("row", 6)


def test_several_tokens_of_a_step_are_rows_so_that_they_stay_behind_those_before_them_in_a_frame() -> None:
    request, tokens = Request("r", [1, 2], SamplingParams(max_tokens=9)), (SampledToken(5), SampledToken(6))
    live: Any = SimpleNamespace(order=order())

    def said(num_outputs: int, finish_reason: FinishReason | None = None) -> list[tuple[int, list[int] | None]]:
        counts = {"num_output_tokens": num_outputs, "num_cached_tokens": 2, "num_preemptions": 0}
        news = news_of_step(live, RequestUpdate(request, 3, tokens, finish_reason, **counts))
        return [(each.token_id, None if each.output is None else list(each.output.token_ids)) for each in news]

    assert said(4) == [(5, None), (6, None)]
    assert said(2) == [(0, [5, 6])], "the first comes as an output, which stands before all rows"
    assert said(4, FinishReason.LENGTH) == [(0, [5, 6])], "as does the last, which is read behind them"


async def test_a_cancellation_that_nobody_ordered_does_not_leave_a_request_without_an_end() -> None:
    async def restore(hashes: object) -> None:
        raise asyncio.CancelledError  # as grpc.aio does where a channel was closed

    output = await last_output(order(), engine=engine(), host_prefixes=SimpleNamespace(restore=restore))
    assert (output.finish_reason, output.error.code) == (pb.FINISH_REASON_ERROR, pb.ERROR_CODE_INTERNAL)
    assert "nobody had ordered" in output.error.message


async def test_what_our_own_engine_cannot_serve_is_not_computed_elsewhere_first() -> None:
    async def restore(hashes: object) -> None: ...

    async def connect(address: str) -> str:
        raise AssertionError("a prefill worker was asked")

    def refuse(request: object) -> None:
        raise InvalidRequest("max_tokens", "this pool is too small")

    output = await last_output(
        order(prefill_targets=[pb.PrefillTarget(worker_id="prefill-0")]),
        engine=engine(refuse),
        host_prefixes=SimpleNamespace(restore=restore),
        exchange=SimpleNamespace(connect=connect),
    )
    assert output.error.code == pb.ERROR_CODE_INVALID
    assert "too small" in output.error.message


async def test_an_output_that_cannot_be_sent_ends_its_request_and_costs_the_others_no_token() -> None:
    class BrokenOnce(MetricsOfTheTest):
        num_first_tokens = 0

        def first_token(self, timeline: object) -> None:
            self.num_first_tokens += 1
            if self.num_first_tokens == 1:
                raise RuntimeError("a bug")

    async def restore(hashes: object) -> None:
        await asyncio.get_running_loop().create_future()

    parts = SimpleNamespace(
        worker_id="decode-0",
        incarnation="1",
        thread=ThreadOfTheTest(),
        threads=LoopThreads(),
        clock=time.time,
        metrics=BrokenOnce(),
        engine=engine(),
        host_prefixes=SimpleNamespace(restore=restore),
        rates=RateLearner(),
    )
    service = DecodeService(DecodeConfig(model="model"), parts)  # type: ignore[arg-type]
    session = RouterSession("router", 1, "1", pb.Load, lambda: parts.rates.rates)
    service._sessions[session] = {}
    first, second = order(), order()
    second.handle = 2
    for each in (first, second):
        service._start(session, each)
    lives = list(service._sessions[session].values())
    service._deliver([News(live, 7) for live in lives])
    assert [live.states.state for live in lives] == [LiveState.ENDED, LiveState.DECODING]
    assert lives[1].usage.num_generated_tokens == 1
    service._abort(lives[1], "the test is over")
    await asyncio.wait([live.admission for live in lives if live.admission is not None])


@pytest.mark.parametrize("stage", ["restore", "fetch", "handoff"])
async def test_a_deadline_ends_the_work_of_every_stage_and_goes_with_what_is_ordered(stage: str) -> None:
    """The engine's stages end by its abort, which the commands to its thread are for."""
    ended: list[str] = []
    ordered: list[pb.PrefillRequest] = []

    async def hang(name: str) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append(name)

    async def restore(hashes: object) -> None:
        if stage == "restore":
            await hang(stage)

    async def fetch(hashes: object, sources: object) -> list[object]:
        await hang("fetch")
        return []

    async def connect(address: str) -> str:
        return "prefill-0/1"

    async def prefill(address: str, message: pb.PrefillRequest) -> AsyncIterator[pb.PrefillEvent]:
        ordered.append(message)
        await hang("handoff")
        yield pb.PrefillEvent()

    transfer = SimpleNamespace(result=asyncio.get_running_loop().create_future(), abort=lambda reason: None)
    exchange = SimpleNamespace(
        connect=connect,
        fetch=lambda *_: transfer,
        new_id=lambda: bytes(16),
        identity=SimpleNamespace(peer_id="decode-0/1"),
        clock=time.monotonic,
    )
    targets = [pb.PrefillTarget(worker_id="prefill-0", incarnation="1")] if stage == "handoff" else []
    asked = order(prefill_targets=targets)
    asked.timeout_s = 1.0
    output = await last_output(
        asked,
        engine=engine(),
        host_prefixes=SimpleNamespace(restore=restore),
        fetcher=SimpleNamespace(fetch=fetch),
        exchange=exchange,
        orders=SimpleNamespace(prefill=prefill),
    )
    assert output.error.code == pb.ERROR_CODE_DEADLINE
    assert ended == [stage]
    assert [0 < message.timeout_s <= 1.0 for message in ordered] == [True] * (stage == "handoff")


async def frames_of(session: RouterSession, number: int) -> list[pb.SessionFrame]:
    """The first frames that a session sends."""
    frames: asyncio.Queue[pb.SessionFrame] = asyncio.Queue()
    sending = asyncio.create_task(session.send_frames(frames.put))
    async with asyncio.timeout(60):
        got = [await frames.get() for _ in range(number)]
    session.close()
    await sending
    return got


async def test_a_session_speaks_as_often_as_it_promised_with_nothing_to_say() -> None:
    rates = RateLearner().rates
    first, *others = await frames_of(RouterSession("router", 1, "7", pb.Load, lambda: rates, heartbeat_s=0.1), 4)
    assert first.heartbeat_s == pytest.approx(0.1)
    assert all(frame == pb.SessionFrame(load=pb.Load()) for frame in others)


async def test_a_session_says_at_once_that_the_worker_stands_still_and_that_it_gets_on() -> None:
    rates = RateLearner().rates
    session = RouterSession("router", 1, "7", pb.Load, lambda: rates)
    loop = asyncio.get_running_loop()
    loop.call_later(0.01, session.set_stuck, "step loop")
    loop.call_later(0.05, session.set_stuck, "")
    first, *others = await frames_of(session, 3)
    assert (first.heartbeat_s, first.stuck) == (0.0, "")
    assert [frame.stuck for frame in others] == ["step loop", ""]


async def test_a_worker_that_stands_still_takes_nothing_on() -> None:
    parts = SimpleNamespace(
        worker_id="decode-0",
        incarnation="1",
        engine=engine(),
        thread=ThreadOfTheTest(),
        metrics=MetricsOfTheTest(),
        rates=RateLearner(),
        clock=time.time,
    )
    service = DecodeService(DecodeConfig(model="model"), parts)  # type: ignore[arg-type]
    service._load = pb.Load  # type: ignore[method-assign]
    service.set_stuck("step loop")
    router = RouterOfTheTest(order())
    serving = asyncio.create_task(service.serve_session(router.orders(), router.send))  # type: ignore[arg-type]
    async with asyncio.timeout(60):
        output = await router.outputs.get()
    serving.cancel()
    await asyncio.wait([serving])
    assert output.error.code == pb.ERROR_CODE_UNAVAILABLE
    assert "no progress: step loop" in output.error.message
