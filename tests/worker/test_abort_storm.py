"""Nine of ten requests are aborted in one moment: the rest get their tokens, who comes is served, no block is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tandem.v1 import worker_pb2 as pb

from tests.hf_models import random_prompts, reference_greedy, write_model
from tests.memory_transport import Switchboard
from tests.waiting import until
from tests.worker.decode_worker import DecodeWorker, ended, running

NUM_REQUESTS = 100
NUM_PROMPTS = 5
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("models") / "llama3", "llama3", seed=3)


async def test_an_abort_storm_costs_those_who_stay_no_token_and_no_block_is_lost(model: Path) -> None:
    prompts = random_prompts([40] * NUM_PROMPTS, seed=31)
    expected = reference_greedy(model, prompts, NUM_TOKENS, ignore_eos=True)

    def order(handle: int) -> pb.GenerateRequest:
        sampling = pb.SamplingParams(top_p=1, repetition_penalty=1, max_tokens=NUM_TOKENS, ignore_eos=True)
        prompt = prompts[handle % NUM_PROMPTS]
        return pb.GenerateRequest(handle=handle, request_id=f"r{handle}", prompt_token_ids=prompt, sampling=sampling)

    worker = DecodeWorker("decode-0", model, Switchboard())  # whose end finds every block free
    async with running(worker) as (router,):
        answers = [router.generate(order(handle)) for handle in range(NUM_REQUESTS)]
        await until(lambda: any(answer.token_ids for answer in answers))
        load = worker.parts.engine.load()
        assert min(load.num_running, load.num_waiting) > 0
        staying = range(0, NUM_REQUESTS, 10)
        cut = [handle for handle in range(NUM_REQUESTS) if handle not in staying and answers[handle].last is None]
        assert len(cut) > NUM_REQUESTS // 2
        for handle in cut:
            router.abort(handle)
        newcomers = range(NUM_REQUESTS, NUM_REQUESTS + 10)
        answers += [router.generate(order(handle)) for handle in newcomers]
        for handle in (*staying, *newcomers):
            await ended(answers[handle])
            assert answers[handle].token_ids == expected[handle % NUM_PROMPTS]
        await until(lambda: worker.num_free == worker.parts.engine.capabilities.num_blocks)
        ends = [(await ended(answers[handle])).finish_reason for handle in cut]
        assert ends.count(pb.FINISH_REASON_ABORT) > NUM_REQUESTS // 2
        assert set(ends) <= {pb.FINISH_REASON_ABORT, pb.FINISH_REASON_LENGTH}
