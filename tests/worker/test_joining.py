"""A handoff whose blocks the decode worker's own engine does not take costs a computation, and no answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tandem.v1 import worker_pb2 as pb

from kvstore.protocol import FetchResult, FetchStamps, Reservation
from services.decode import admission
from services.decode.handoff import Handoff
from services.decode.session import RouterSession
from services.engine.api import NotReserved
from tests.hf_models import random_prompts, write_model
from tests.memory_transport import Switchboard
from tests.worker.decode_worker import DecodeWorker, ended, running


def order(handle: int, prompt: list[int], *targets: str) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=20, ignore_eos=True, presence_penalty=0.5)
    workers = [pb.PrefillTarget(worker_id=target, incarnation=target) for target in targets]
    return pb.GenerateRequest(
        handle=handle, request_id=f"r{handle}", prompt_token_ids=prompt, sampling=sampling, prefill_targets=workers
    )


async def prefilled(
    order: pb.PrefillRequest,
    target: pb.PrefillTarget,
    hashes: Sequence[object],
    reserve: Callable[[int], Awaitable[Reservation]],
    *_: object,
    **__: object,
) -> Handoff:
    """As if a prefill worker had computed it, and all blocks had come, whatever is in them."""
    room = await reserve(len(hashes))
    return Handoff(pb.PrefillFinished(token_id=7), FetchResult(room.block_ids, 0, 0, FetchStamps(), None, []))


@pytest.mark.parametrize("is_busy", [False, True])
async def test_the_first_token_is_said_before_the_others_and_does_not_keep_an_idle_engine_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_busy: bool
) -> None:
    torch.set_num_threads(1)
    model, (prompt,) = write_model(tmp_path / "llama3", "llama3", seed=3), random_prompts([37])
    worker = DecodeWorker("decode-0", model, Switchboard(), local_prefill_max_tokens=0)
    happened: list[str] = []

    async with running(worker) as (router,):
        engine, say, join = worker.parts.engine, RouterSession.push, worker.parts.engine.add_prefilled

        async def come(*arguments: Any, **options: Any) -> Handoff:
            handoff = await prefilled(*arguments, **options)
            worker.parts.thread.is_in_turn = is_busy
            return handoff

        def joined(*arguments: Any) -> object:
            happened.append("joined")
            return join(*arguments)

        def said(session: RouterSession, output: pb.Output) -> None:
            happened.append("said")
            say(session, output)

        monkeypatch.setattr(admission, "prefill_remotely", come)
        monkeypatch.setattr(engine, "add_prefilled", joined)
        monkeypatch.setattr(RouterSession, "push", said)
        answer = router.generate(order(1, prompt, "prefill-0"))
        await ended(answer)
        assert happened[:2] == (["said", "joined"] if is_busy else ["joined", "said"])
        assert (answer.token_ids[0], len(answer.token_ids)) == (7, 20)


@pytest.mark.parametrize("num_prompt_tokens", [37, 47])
async def test_it_goes_on_behind_the_first_token_that_it_has_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_prompt_tokens: int
) -> None:
    torch.set_num_threads(1)
    model, (prompt,) = write_model(tmp_path / "llama3", "llama3", seed=3), random_prompts([num_prompt_tokens])
    worker = DecodeWorker("decode-0", model, Switchboard(), local_prefill_max_tokens=0)
    num_handoffs = 0

    async def hand_over(*arguments: Any, **options: Any) -> Handoff:
        nonlocal num_handoffs
        num_handoffs += 1
        handoff = await prefilled(*arguments, **options)
        handoff.finished.token_id = whole.token_ids[0]
        return handoff

    def refuse(*_: object) -> None:
        raise NotReserved("it has no place")

    async with running(worker) as (router,):
        whole = router.generate(order(1, prompt))
        await ended(whole)
        monkeypatch.setattr(admission, "prefill_remotely", hand_over)
        monkeypatch.setattr(worker.parts.engine, "add_prefilled", refuse)
        answer = router.generate(order(2, prompt, "prefill-0", "prefill-1"))
        last = await ended(answer)
        assert last.finish_reason == pb.FINISH_REASON_LENGTH
        assert answer.token_ids == whole.token_ids
        assert (last.usage.num_recomputes, last.usage.num_generated_tokens, num_handoffs) == (1, 20, 1)
