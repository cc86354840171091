"""The unmodified SDK against the router, with a worker that has no model."""

from __future__ import annotations

import asyncio

import openai
import pytest
from tandem.v1 import worker_pb2 as pb

from services.router.config import RouterConfig
from tests.openai_suite import SUITE, Capabilities
from tests.router.fake_worker import FakeWorker, Script, endless, failing
from tests.router.harness import ThreadedRouter


@pytest.fixture(scope="module")
def router(model_directory, sentence):
    """One that waits for no worker to come: there is one alone, and its refusals are to be heard at once."""
    only = FakeWorker(endless(sentence), model_path=str(model_directory), colocated=True)
    with ThreadedRouter(RouterConfig(resume_wait_s=0), lambda: [only]) as threaded:
        yield threaded


@pytest.fixture(scope="module")
def client(router):
    with openai.OpenAI(base_url=f"{router.base_url}/v1", api_key="none", max_retries=0, timeout=60) as sdk:
        yield sdk


@pytest.mark.parametrize("behaviour", SUITE, ids=lambda behaviour: behaviour.__name__)
def test_the_suite(behaviour, client, worker):
    behaviour(client, "tiny", Capabilities(max_model_len=256))


def test_a_cut_stream_aborts_at_the_worker(client, router, worker):
    permits = asyncio.Semaphore(2)
    worker.reply = lambda request: Script([[300]] * 200, permits=permits)
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=200, n=2, stream=True)
    next(iter(stream))
    stream.close()
    router.call(worker.wait_for_abort(2))
    assert {abort.handle for abort in worker.aborts} == {request.handle for request in worker.requests}


def test_an_error_in_mid_stream_raises(client, worker):
    worker.reply = failing(pb.ERROR_CODE_INTERNAL, "the model burst", after=[[300], [301]])
    stream = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], stream=True)
    with pytest.raises(openai.APIError, match="the model burst"):
        list(stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "exception"),
    [
        (pb.ERROR_CODE_INVALID, openai.BadRequestError),
        (pb.ERROR_CODE_OVERLOADED, openai.RateLimitError),
        (pb.ERROR_CODE_UNAVAILABLE, openai.InternalServerError),
        (pb.ERROR_CODE_INTERNAL, openai.InternalServerError),
        (pb.ERROR_CODE_DEADLINE, openai.InternalServerError),
    ],
)
def test_a_worker_s_refusal_is_an_http_error_even_for_a_stream(client, worker, code, exception, stream):
    worker.reply = failing(code)
    with pytest.raises(exception, match="as the test wants it") as caught:
        client.completions.create(model="tiny", prompt="x", stream=stream)
    if code == pb.ERROR_CODE_OVERLOADED:
        assert int(caught.value.response.headers["retry-after"]) >= 1
