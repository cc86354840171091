"""Lists of tokens that a router has sent apart from its orders: the orders that name them go by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tandem.v1 import worker_pb2 as pb

from tests.hf_models import random_prompts, write_model
from tests.memory_transport import Switchboard
from tests.worker.decode_worker import DecodeWorker, ended, running

ALLOWED = range(20, 90)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("models") / "llama3", "llama3", seed=3)


async def test_orders_that_name_lists_are_served_as_those_that_have_them(model: Path) -> None:
    (prompt,) = random_prompts([37], seed=5)
    lists = pb.SamplingParams(allowed_token_ids=ALLOWED, logit_bias={30: 2.0, 40: -2.0}, stop_token_ids=[7])

    def order(handle: int, seed: int) -> pb.GenerateRequest:
        sampling = pb.SamplingParams(temperature=1, top_p=1, repetition_penalty=1, max_tokens=8, seed=seed)
        return pb.GenerateRequest(handle=handle, request_id=f"r{handle}", prompt_token_ids=prompt, sampling=sampling)

    worker = DecodeWorker("decode-0", model, Switchboard())
    async with running(worker) as (router,):
        whole = [order(seed, seed) for seed in (1, 2, 3)]
        for each in whole:
            each.sampling.MergeFrom(lists)
        expected = [router.generate(each) for each in whole]
        router.tell(pb.SessionRequest(lists=pb.TokenLists(number=9, sampling=lists)))
        named = [order(10 + seed, seed) for seed in (1, 2, 3)]
        for each in named:
            each.token_lists = 9
        answers = [router.generate(each) for each in named]
        router.tell(pb.SessionRequest(forget=pb.ForgetLists(number=9)))
        late = order(20, 1)
        late.token_lists = 9
        refused = router.generate(late)
        for answer in (*expected, *answers):
            assert (await ended(answer)).finish_reason == pb.FINISH_REASON_LENGTH
        error = (await ended(refused)).error
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    assert {token_id for answer in answers for token_id in answer.token_ids} <= set(ALLOWED)
    assert (error.code, error.message) == (pb.ERROR_CODE_INTERNAL, "no token lists 9 came in this session")
