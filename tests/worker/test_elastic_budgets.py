"""A router changes an elastic worker's role and budgets; its load says what it has, whatever was wanted."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from tandem.v1 import worker_pb2 as pb

from services.budgets import DEFLECTED_CHUNK, UNBOUND, UNLIMITED, Budgets
from services.elastic.config import ElasticConfig
from services.engine.api import BudgetsFixed, InvalidRequest, Request
from services.engine.native import Engine
from services.orders import BUDGETS, budgets_to_proto
from services.worker import convert
from tests.hf_models import random_prompts, write_model
from tests.memory_orders import MemoryOrders
from tests.memory_transport import Switchboard
from tests.waiting import until
from tests.worker.decode_worker import DecodeWorker, RouterOf, ended, running
from tests.worker.elastic_worker import ElasticWorker
from tests.worker.test_elastic import order


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("models") / "llama3", "llama3", seed=3)


class Listening(RouterOf):
    """Keeps all frames, too."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[pb.SessionFrame] = []

    async def send(self, frame: pb.SessionFrame) -> None:
        self.frames.append(frame)
        await super().send(frame)

    def wants(self, **budgets: object) -> None:
        self.tell(pb.SessionRequest(budgets=pb.Budgets(**budgets)))  # type: ignore[arg-type]

    @property
    def said(self) -> pb.Budgets:
        """What the worker has, by its latest load."""
        return self.frames[-1].load.budgets


@asynccontextmanager
async def session(worker: DecodeWorker) -> AsyncIterator[Listening]:
    async with running(worker):
        router = Listening()
        serving = asyncio.create_task(worker.serve_session(router.orders(), router.send))
        await until(lambda: router.frames)
        yield router
        serving.cancel()
        await asyncio.wait([serving])


def elastic(model: Path, **settings: object) -> ElasticWorker:
    return ElasticWorker("elastic-0", model, Switchboard(), MemoryOrders(), **settings)


@pytest.mark.parametrize(
    ("role", "tpot_s", "prompt_tokens"), [("prefill", 0.05, None), ("decode", 0.04, DEFLECTED_CHUNK)]
)
async def test_a_worker_begins_with_the_budgets_of_its_role(
    model: Path, role: str, tpot_s: float, prompt_tokens: int | None
) -> None:
    worker = elastic(model, role=role, tpot_objective=50.0)
    async with session(worker) as router:
        assert BUDGETS in router.frames[0].features
        assert (router.said.role, router.said.tpot_s) == (role, pytest.approx(tpot_s))
        assert (router.said.prompt_tokens if router.said.HasField("prompt_tokens") else None) == prompt_tokens
        assert worker.parts.engine.budgets == ElasticConfig(model="m", role=role, tpot_objective=50.0).budgets
        assert worker.state["role_now"] == role


async def test_a_router_changes_them_while_streams_run(model: Path) -> None:
    worker, (prompt,) = elastic(model), random_prompts([40], seed=1)
    async with session(worker) as router:
        answer = router.generate(order(1, prompt, max_tokens=150))
        await until(lambda: answer.token_ids)
        router.wants(role="prefill", tpot_s=0.25, prompt_tokens=96)
        await until(lambda: router.said.role == "prefill")
        assert (router.said.tpot_s, router.said.prompt_tokens) == (0.25, 96)
        assert worker.parts.engine.budgets == Budgets(0.25, 96)
        assert len((await ended(answer)).stamps)
        router.wants(role="decode")
        await until(lambda: router.said.role == "decode")
        assert (router.said.tpot_s, router.said.HasField("prompt_tokens")) == (0.0, False)
        assert worker.parts.engine.budgets == Budgets()


@pytest.mark.parametrize(
    "wanted",
    [
        {"role": "prefill", "tpot_s": -0.1},
        {"role": "prefill", "tpot_s": math.nan},
        {"role": "both", "tpot_s": 0.1},
        {"tpot_s": 0.1},
    ],
)
async def test_what_makes_no_sense_is_refused_and_logged(
    model: Path, wanted: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    worker = elastic(model, tpot_objective=50.0)
    before = worker.parts.engine.budgets
    async with session(worker) as router:
        router.wants(**wanted)
        await until(lambda: "budgets of a router are refused" in caplog.text)
        assert worker.parts.engine.budgets == before
        assert worker.state["role_now"] == "decode"
        router.wants(role="prefill", prompt_tokens=2**32 - 1)
        await until(lambda: router.said.role == "prefill")
        assert worker.parts.engine.budgets == Budgets(prompt_tokens=UNLIMITED)


async def test_an_engine_that_cannot_change_them_goes_on_and_the_load_says_so(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = elastic(model, tpot_objective=50.0)

    def fixed(budgets: Budgets) -> None:
        raise BudgetsFixed(["tpot_s"], "it has none")

    monkeypatch.setattr(worker.parts.engine, "set_budgets", fixed)
    caplog.set_level(logging.WARNING)
    async with session(worker) as router:
        router.wants(role="prefill", tpot_s=0.25)
        await until(lambda: "stays a decode worker" in caplog.text)
        assert "tpot_s cannot be changed: it has none" in caplog.text
        assert (worker.state["role_now"], router.said.role) == ("decode", "decode")


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_whose_engine_keeps_to_none_says_so_before_a_router_tries(model: Path, role: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "set_budgets", keeps_to_none)
        worker = elastic(model, role=role)
    async with session(worker) as router:
        assert BUDGETS not in router.frames[0].features
        assert router.said.role == role


def keeps_to_none(engine: Engine, budgets: Budgets) -> None:
    if budgets != UNBOUND:
        raise BudgetsFixed(["tpot_s"], "it has none")


async def test_a_load_says_how_long_the_running_streams_are(model: Path) -> None:
    worker, (prompt,) = elastic(model), random_prompts([40], seed=1)
    async with session(worker) as router:
        answer = router.generate(order(1, prompt, max_tokens=150))
        await until(lambda: len(answer.token_ids) > 20)
        await until(lambda: router.frames[-1].load.num_context_tokens > 40)
        await ended(answer)
        await until(lambda: not router.frames[-1].load.num_context_tokens)


async def test_a_fixed_worker_has_none_and_takes_none(model: Path) -> None:
    worker = DecodeWorker("decode-0", model, Switchboard())
    async with session(worker) as router:
        assert BUDGETS not in router.frames[0].features
        assert not router.frames[0].load.HasField("budgets")


async def test_the_engine_hears_what_a_client_is_to_get(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, (prompt,) = elastic(model), random_prompts([40], seed=1)
    requests: list[Request] = []
    add = worker.parts.engine.add_request
    monkeypatch.setattr(worker.parts.engine, "add_request", lambda request: (requests.append(request), add(request)))
    async with session(worker) as router:
        begun = order(1, prompt)
        begun.tpot_objective_s = 0.03
        await ended(router.generate(begun))
        await ended(router.generate(order(2, prompt)))
        assert [request.tpot_s for request in requests] == [0.03, math.inf]
        begun = order(3, prompt)
        begun.tpot_objective_s = math.nan
        assert (await ended(router.generate(begun))).error.code == pb.ERROR_CODE_INVALID


@pytest.mark.parametrize("budgets", [Budgets(), Budgets(0.05, 128), Budgets(math.inf, 0), Budgets(0.1)])
def test_budgets_travel_whole(budgets: Budgets) -> None:
    message = pb.Budgets.FromString(budgets_to_proto("prefill", budgets).SerializeToString())
    assert convert.budgets_from_proto(message) == ("prefill", budgets)


def test_an_objective_below_nothing_is_the_clients_mistake() -> None:
    with pytest.raises(InvalidRequest, match="tpot_objective_s"):
        convert.tpot_from_proto(pb.GenerateRequest(tpot_objective_s=-1))
