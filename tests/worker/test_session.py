"""The outgoing half of a router's session: what piles up while a frame is being sent goes with the next one."""

from __future__ import annotations

import asyncio

import pytest
from tandem.v1 import worker_pb2 as pb

from services.decode import session as session_module
from services.decode.session import RouterSession, SessionOverflow
from services.rates import GUESSED, RateLearner, StepShape
from tests.waiting import until


def output(token_id: int) -> pb.Output:
    return pb.Output(handle=1, token_ids=[token_id])


async def test_outputs_of_one_step_are_one_frame_and_a_close_sends_what_is_pending() -> None:
    frames: list[pb.SessionFrame] = []

    async def send(frame: pb.SessionFrame) -> None:
        frames.append(frame)

    session = RouterSession("router", 1, "incarnation-1", lambda: pb.Load(num_running=1), lambda: GUESSED)
    sending = asyncio.create_task(session.send_frames(send))
    await asyncio.sleep(0)
    session.push(output(1))
    session.push_token(7, 2)
    session.push_token(8, 3)
    await until(lambda: len(frames) == 2)
    session.push_token(8, 4)
    session.close()
    await sending
    assert [[each.token_ids[0] for each in frame.outputs] for frame in frames] == [[], [1], []]
    assert [(list(frame.handles), list(frame.token_ids)) for frame in frames] == [
        ([], []),
        ([7, 8], [2, 3]),
        ([8], [4]),
    ]
    assert frames[0].incarnation == "incarnation-1"


async def test_a_changed_load_is_told_without_outputs() -> None:
    frames: asyncio.Queue[pb.SessionFrame] = asyncio.Queue()
    load = pb.Load(num_running=1)
    session = RouterSession(
        "router", 1, "incarnation-1", lambda: pb.Load(num_running=load.num_running), lambda: GUESSED
    )
    sending = asyncio.create_task(session.send_frames(frames.put))
    assert (await frames.get()).load.num_running == 1
    load.num_running = 5
    assert (await frames.get()).load.num_running == 5
    session.close()
    await sending


async def test_rates_are_told_at_first_and_again_when_there_is_news() -> None:
    frames: asyncio.Queue[pb.SessionFrame] = asyncio.Queue()
    learner = RateLearner()
    session = RouterSession("router", 1, "incarnation-1", pb.Load, lambda: learner.rates)
    sending = asyncio.create_task(session.send_frames(frames.put))
    assert (await frames.get()).load.rates.base_s == GUESSED.base_s
    session.push(output(1))
    assert not (await frames.get()).load.HasField("rates")
    learner.step_ended(StepShape(num_running=3, num_context_tokens=100), 0.5)
    session.push(output(2))
    assert (await frames.get()).load.rates.running_s == learner.rates.running_s != GUESSED.running_s
    session.close()
    await sending


async def test_a_router_that_does_not_read_loses_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_PENDING_OUTPUTS", 10)

    async def send(frame: pb.SessionFrame) -> None: ...

    session = RouterSession("router", 1, "incarnation-1", pb.Load, lambda: GUESSED)
    session.push(output(0))
    for token_id in range(10):
        session.push_token(1, token_id)
    with pytest.raises(SessionOverflow, match="more than 10 outputs"):
        await session.send_frames(send)


async def test_a_router_that_hangs_in_mid_frame_loses_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_PENDING_OUTPUTS", 10)

    async def send(frame: pb.SessionFrame) -> None:
        await asyncio.get_running_loop().create_future()  # never

    session = RouterSession("router", 1, "incarnation-1", pb.Load, lambda: GUESSED)
    sending = asyncio.create_task(session.send_frames(send))
    await asyncio.sleep(0)
    session.push(output(0))
    for token_id in range(10):
        session.push_token(1, token_id)
    with pytest.raises(SessionOverflow, match="more than 10 outputs"):
        await sending
