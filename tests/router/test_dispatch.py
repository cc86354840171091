"""Several workers: who gets a request, what happens when one fails or goes, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import grpc
import httpx
import msgspec
import pytest
from tandem.v1 import worker_pb2 as pb

from services.orders import LISTS, MOVES, RESUMES
from services.router.config import RouterConfig
from services.router.edge import GenerateEndpoint
from services.router.edge.access import AccessRecord
from services.router.fleet.session import WorkerSession
from services.router.fleet.silence import Silence
from services.router.openai import CompletionBody, CompletionRenderer, plan_completion
from services.router.text import ModelTokenizer
from tests.router.fake_worker import FakeWorker, Script, endless, failing, permit
from tests.router.harness import running_router, until

CONFIG = RouterConfig(reconnect_max_s=0.2)
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 4}
UNAVAILABLE = pb.Error(code=pb.ERROR_CODE_UNAVAILABLE)


def client(running) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=running.base_url, timeout=60)


def first_then(script: Script, otherwise):
    """The first request gets the script, later ones the other reply."""
    replies = iter([lambda request: script])
    return lambda request: next(replies, otherwise)(request)


async def test_a_refused_request_goes_to_another_worker(make_worker, sentence, tokenizer):
    busy = make_worker(failing(pb.ERROR_CODE_OVERLOADED))
    free = make_worker(load=pb.Load(num_running=5))  # more loaded, so it is the second choice
    async with running_router(CONFIG, busy, free) as running, client(running) as http:
        answer = (await http.post("/v1/completions", json=BODY)).json()
        assert answer["choices"][0]["text"] == tokenizer.decode(sentence[:4])
        assert (len(busy.requests), len(free.requests)) == (1, 1)
        assert busy.requests[0].sampling == free.requests[0].sampling  # the seed too: the answer does not depend on it
        assert "tandem:router_retries_total 1.0" in (await http.get("/metrics")).text


async def test_when_all_refuse_the_client_hears_the_last_refusal(make_worker):
    workers = [make_worker(failing(pb.ERROR_CODE_OVERLOADED, "full")) for _ in range(2)]
    async with running_router(CONFIG, *workers) as running, client(running) as http:
        response = await http.post("/v1/completions", json=BODY)
    assert response.status_code == 429
    assert [len(worker.requests) for worker in workers] == [1, 1]


async def test_attempts_are_bounded(make_worker):
    workers = [make_worker(failing(pb.ERROR_CODE_UNAVAILABLE)) for _ in range(4)]
    async with running_router(RouterConfig(max_attempts=2), *workers) as running, client(running) as http:
        assert (await http.post("/v1/completions", json=BODY)).status_code == 503
    assert sum(len(worker.requests) for worker in workers) == 2


@pytest.mark.parametrize("code", [pb.ERROR_CODE_INVALID, pb.ERROR_CODE_INTERNAL, pb.ERROR_CODE_DEADLINE])
async def test_what_another_worker_would_fail_at_too_is_not_retried(make_worker, code):
    workers = [make_worker(failing(code)) for _ in range(2)]
    async with running_router(CONFIG, *workers) as running, client(running) as http:
        assert (await http.post("/v1/completions", json=BODY)).status_code >= 400
    assert sum(len(worker.requests) for worker in workers) == 1


async def test_an_answer_not_yet_shown_keeps_what_its_dead_worker_had_said(make_worker, sentence, tokenizer):
    permits = asyncio.Semaphore(1)
    dying = make_worker(lambda request: Script([[300], [301]], pb.FINISH_REASON_UNSPECIFIED, permits=permits))
    other = make_worker(load=pb.Load(num_running=5))
    async with running_router(CONFIG, dying, other) as running, client(running) as http:
        asking = asyncio.create_task(http.post("/v1/completions", json={**BODY, "logprobs": 0}))
        await until(lambda: has_said_one(running))
        await dying.stop()
        answer = (await asking).json()
    choice = answer["choices"][0]
    assert choice["text"] == tokenizer.decode([300, *sentence[1:4]])
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"] == 4
    assert [list(order.resumed_token_ids) for order in other.requests] == [[300]]


def has_said_one(running) -> bool:
    return sample(running.parts.metrics.exposition().decode(), "vllm:generation_tokens_total{") == 1


async def test_a_choice_that_a_stop_string_has_ended_does_not_go_on(make_worker, sentence, tokenizer):
    class Dying(FakeWorker):
        """Gives a request up in the very frame that completes a stop string."""

        async def _run(self, request, frames):
            tokens = pb.Output(handle=request.handle, token_ids=sentence[:4])
            end = pb.Output(handle=request.handle, finish_reason=pb.FINISH_REASON_ERROR, error=UNAVAILABLE)
            frames.put_nowait(pb.SessionFrame(outputs=[tokens, end], load=self.load))

    original = make_worker()
    dying = Dying(original.reply, model_path=original.model_path)
    other = make_worker(load=pb.Load(num_running=5))
    before, stop = tokenizer.decode(sentence[:3]), tokenizer.decode(sentence[3:4])
    async with running_router(CONFIG, dying, other) as running, client(running) as http:
        answer = (await http.post("/v1/completions", json=BODY | {"stop": stop, "max_tokens": 9})).json()
        metrics = (await http.get("/metrics")).text
    assert other.requests == []
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (before, "stop", stop)
    assert (sample(metrics, "vllm:num_requests_waiting{"), sample(metrics, "vllm:num_requests_running{")) == (0, 0)


async def test_a_stream_that_has_shown_tokens_goes_on_when_its_worker_dies(make_worker, sentence, tokenizer):
    dying = make_worker(lambda request: Script([[300]], pb.FINISH_REASON_UNSPECIFIED))
    other = make_worker(load=pb.Load(num_running=5))
    async with (
        running_router(CONFIG, dying, other) as running,
        client(running) as http,
        http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response,
    ):
        lines = response.aiter_lines()
        events = [await anext(lines)]
        await dying.stop()
        events += [line async for line in lines]
    chunks = [json.loads(line[6:]) for line in events if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == tokenizer.decode([300, *sentence[1:4]])
    assert events[-2:] == ["data: [DONE]", ""]


async def test_a_stream_without_tokens_yet_moves_on(make_worker, sentence, tokenizer):
    dying = make_worker(lambda request: Script([], pb.FINISH_REASON_UNSPECIFIED))
    other = make_worker(load=pb.Load(num_running=5))
    async with running_router(CONFIG, dying, other) as running, client(running) as http:
        asking = asyncio.create_task(http.post("/v1/completions", json={**BODY, "stream": True}))
        await until(lambda: dying.requests)
        await dying.stop()
        text = (await asking).text
    assert text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == tokenizer.decode(sentence[:4])


async def test_a_worker_that_comes_back_is_used_again(make_worker):
    worker = make_worker()
    async with running_router(CONFIG, worker) as running, client(running) as http:
        await worker.stop()
        await until(lambda: running.parts.workers.num_sessions_up == 0)
        response = await http.post("/v1/completions", json=BODY)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/health")).status_code == 200
        await worker.start()
        await until(lambda: running.parts.workers.num_sessions_up == 1)
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200


class OneFrame(FakeWorker):
    """Says all that its script says in one frame, as a worker does whose router reads slowly."""

    handles: tuple[int, ...] = ()

    async def _run(self, request, frames):
        (token_ids,) = self.reply(request).frames
        first, *rest, last = token_ids
        handle = request.handle
        frame = pb.SessionFrame(handles=self.handles or [handle] * len(rest), token_ids=rest)
        frame.outputs.add(handle=handle, token_ids=[last], finish_reason=pb.FINISH_REASON_LENGTH)
        frame.outputs.add(handle=handle, token_ids=[first])
        frames.put_nowait(frame)


async def test_first_token_rows_and_last_output_of_one_frame_come_in_that_order(make_worker, sentence, tokenizer):
    worker = OneFrame(lambda request: Script([sentence[:4]]), model_path=make_worker().model_path)
    async with running_router(CONFIG, worker) as running, client(running) as http:
        answer = (await http.post("/v1/completions", json={**BODY, "return_token_ids": True})).json()
    assert answer["choices"][0]["token_ids"] == sentence[:4]
    assert answer["choices"][0]["text"] == tokenizer.decode(sentence[:4])


async def test_columns_of_different_lengths_end_the_session_and_its_requests(make_worker, sentence):
    worker = OneFrame(lambda request: Script([sentence[:4]]), model_path=make_worker().model_path)
    worker.handles = (1, 1, 1)
    async with running_router(CONFIG, worker) as running, client(running) as http:
        answer = await http.post("/v1/completions", json=BODY)
    assert answer.status_code == 500  # at the second time
    assert "3 handles for 2 tokens" in answer.json()["error"]["message"]


async def test_a_session_that_the_other_end_cancels_ends_its_requests_and_is_opened_again(make_worker):
    class Cancelling(FakeWorker):
        """Ends each session with status CANCELLED, which grpc.aio raises here as a CancelledError."""

        async def Session(self, request_iterator, context):
            self.ending = asyncio.Event()
            async for frame in super().Session(request_iterator, context):
                yield frame
                if self.requests:
                    await context.abort(grpc.StatusCode.CANCELLED, "a proxy has had enough")

    original = make_worker(lambda request: Script([[300]], pb.FINISH_REASON_UNSPECIFIED))
    worker = Cancelling(original.reply, model_path=original.model_path)
    async with running_router(CONFIG, worker) as running, client(running) as http:
        assert (await http.post("/v1/completions", json=BODY)).status_code == 500  # at the second time
        worker.requests.clear()
        await until(lambda: running.parts.workers.num_sessions_up == 1)


async def test_a_cancellation_that_nobody_ordered_does_not_cost_the_worker(make_worker):
    class Cancelled:
        num_calls = 0

        async def session(self, address, requests):
            self.num_calls += 1
            raise asyncio.CancelledError
            yield

    orders = Cancelled()
    session = WorkerSession(make_worker().record(), "router", orders, 0.01, Silence(2.0))
    running = asyncio.create_task(session.run())
    await until(lambda: orders.num_calls == 3 or running.done())
    assert not running.done()
    session.close()
    await running


async def test_a_router_says_what_it_knows(make_worker):
    worker = make_worker()
    async with running_router(CONFIG, worker):
        assert [list(hello.features) for hello in worker.hellos[:1]] == [[RESUMES, MOVES, LISTS]]


async def test_a_worker_that_falls_silent_loses_its_requests_and_gets_no_new_ones(make_worker, sentence, tokenizer):
    """As one that hangs, is stopped, or is cut off: its connection stays up, and nothing comes over it."""
    silent = make_worker(lambda request: Script([], pb.FINISH_REASON_UNSPECIFIED), heartbeat_s=0.1)
    other = make_worker(load=pb.Load(num_running=5))
    config = RouterConfig(reconnect_max_s=0.2, silence_timeout_s=2.0)
    async with running_router(config, silent, other) as running, client(running) as http:
        asking = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(2)]
        await until(lambda: len(silent.requests) == 2)
        assert [hello.heartbeat_s for hello in silent.hellos] == [0.5]
        silent.heartbeat_s = 0.0  # and of later sessions it promises nothing
        silent.is_mute.set()
        for answer in await asyncio.gather(*asking):
            assert answer.json()["choices"][0]["text"] == tokenizer.decode(sentence[:4])
        assert len(other.requests) == 2
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        assert len(silent.requests) == 2


async def test_a_worker_that_says_that_it_stands_still_is_left_until_it_gets_on(make_worker):
    stuck = make_worker(lambda request: Script([], pb.FINISH_REASON_UNSPECIFIED))
    other = make_worker(load=pb.Load(num_running=5))
    async with running_router(CONFIG, stuck, other) as running, client(running) as http:
        asking = asyncio.create_task(http.post("/v1/completions", json=BODY))
        await until(lambda: stuck.requests)
        stuck.say(pb.SessionFrame(stuck="step loop"))
        assert (await asking).status_code == 200
        assert (len(stuck.requests), len(other.requests)) == (1, 1)
        # It says so of each session that the router begins, too, until it gets on.
        await until(lambda: len(stuck.hellos) > 2)
        assert running.parts.workers.num_sessions_up == 1
        stuck.stuck = ""
        await until(lambda: running.parts.workers.num_sessions_up == 2)


async def test_a_session_is_owned_to_its_end_though_its_worker_is_back_already(make_worker):
    """Out of the registry and in again, before the old session's task has ended."""
    worker = make_worker()
    async with running_router(CONFIG, worker) as running:
        workers, record = running.parts.workers, worker.record()
        for _ in range(3):
            running.membership.set()
            running.membership.set(record)
        sessions = {task for task in asyncio.all_tasks() if task.get_name() == f"session with {worker.worker_id}"}
        assert len(sessions) == 4
        assert workers._tasks == sessions
        await until(lambda: len(workers._tasks) == 1 and workers.num_sessions_up == 1)
        (left,) = workers._tasks
    assert left.done()


async def test_a_request_that_cannot_take_its_output_ends_alone(make_worker, sentence, monkeypatch):
    permits = asyncio.Semaphore(0)
    worker = make_worker(lambda request: Script([sentence[:2], sentence[2:4]], permits=permits))
    async with running_router(CONFIG, worker) as running, client(running) as http:
        asking = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(2)]
        await until(lambda: len(worker.requests) == 2)
        placer, calls = running.parts.placer, []

        def prefilled(placement, usage):
            calls.append(placement)
            if len(calls) == 1:
                raise ValueError("a bug")

        monkeypatch.setattr(placer, "prefilled", prefilled)
        permit(permits, 4)
        assert sorted(answer.status_code for answer in await asyncio.gather(*asking)) == [200, 500]
        assert running.parts.workers.num_sessions_up == 1
        assert all(candidate.num_outstanding == 0 for candidate in running.parts.workers.decode_candidates())


def sample(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


async def test_the_router_is_not_ready_before_a_prefill_worker_has_registered(make_worker, sentence):
    worker = make_worker()
    prefill = FakeWorker(endless(sentence), worker_id="p").record("prefill")
    async with running_router(CONFIG, worker) as running, client(running) as http:
        early = await http.get("/ready")
        assert early.status_code == 503
        assert "`tiny`: no prefill worker of it has registered yet" in early.json()["error"]["message"]
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200  # who asks is served all the same
        running.membership.set(worker.record(), msgspec.structs.replace(prefill, model_fingerprint="other"))
        assert (await http.get("/ready")).status_code == 503
        running.membership.set(worker.record(), prefill)
        assert (await http.get("/ready")).status_code == 200
        running.membership.set(worker.record())  # gone again: the decode worker prefills by itself
        assert (await http.get("/ready")).status_code == 200


async def test_a_fleet_without_prefill_workers_is_ready_when_it_says_so_or_after_a_while(make_worker):
    worker = make_worker()
    async with running_router(CONFIG, worker) as running, client(running) as http:
        running.membership.set(msgspec.structs.replace(worker.record(), colocated=True))
        assert (await http.get("/ready")).status_code == 200
        running.membership.set(worker.record())
        assert (await http.get("/ready")).status_code == 503
        running.parts.workers._clock = lambda: math.inf
        assert (await http.get("/ready")).json() == {"status": "ready", "models": ["tiny"], "not_ready": {}}


async def test_a_worker_that_starts_is_shown_and_gets_nothing_before_it_serves(make_worker):
    worker = make_worker(colocated=True)
    async with running_router(CONFIG) as running, client(running) as http:
        await worker.start()
        running.workers.append(worker)
        record = worker.record()
        starting = msgspec.structs.replace(record, phase="loading the model", model_fingerprint="", num_blocks=0)
        running.membership.set(starting)
        assert running.parts.workers.decode_candidates() == []
        early = await http.get("/ready")
        assert early.status_code == 503
        assert f"`tiny`: {worker.worker_id} is loading the model" in early.json()["error"]["message"]
        (shown,) = (await http.get("/debug/workers")).json()["workers"]
        assert (shown["phase"], shown["connected"]) == ("loading the model", False)
        assert (shown["worker_id"], shown["incarnation"]) == (record.worker_id, record.incarnation)
        assert (await http.post("/v1/completions", json=BODY)).status_code in (404, 503)
        running.membership.set(record)
        await until(lambda: running.parts.workers.num_sessions_up == 1 and running.parts.models.names() == ["tiny"])
        assert (await http.get("/ready")).status_code == 200
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        assert (len(worker.hellos), len(worker.requests)) == (1, 1)
        await worker.stop()


async def test_ready_names_the_model_that_cannot_be_loaded(make_worker, tmp_path):
    broken = FakeWorker(endless([1]), worker_id="b", model_names=("broken",), model_path=str(tmp_path)).record()
    worker = make_worker(colocated=True)
    async with running_router(CONFIG, worker, extra_records=(broken,)) as running, client(running) as http:
        await until(lambda: "json" in running.parts.models.not_loaded()["broken"])
        answer = (await http.get("/ready")).json()
        assert answer["models"] == ["tiny"]
        assert "has no tokenizer.json" in answer["not_ready"]["broken"]
        running.membership.set(broken)
        answer = await http.get("/ready")
        assert answer.status_code == 503
        assert "has no tokenizer.json" in answer.json()["error"]["message"]


async def test_an_impostor_at_a_worker_s_address_gets_no_requests(make_worker):
    worker = make_worker()
    async with running_router(CONFIG, worker) as running, client(running) as http:
        await worker.stop()
        worker.incarnation = "another-one"
        await worker.start()
        await until(lambda: len(worker.hellos) >= 2)
        assert (await http.post("/v1/completions", json=BODY)).status_code == 503
        # The registry learns of the new incarnation, and the router follows.
        running.membership.set(worker.record())
        await until(lambda: running.parts.workers.num_sessions_up == 1)
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200


async def test_workers_come_and_go(make_worker):
    first, second = make_worker(), make_worker(model_names=("other",))
    async with running_router(CONFIG, first) as running, client(running) as http:
        assert (await http.post("/v1/completions", json={**BODY, "model": "other"})).status_code == 404
        await second.start()
        running.membership.set(first.record(), second.record())
        await until(lambda: running.parts.workers.num_sessions_up == 2 and "other" in running.parts.models.names())
        assert (await http.post("/v1/completions", json={**BODY, "model": "other"})).status_code == 200
        assert len(second.requests) == 1
        running.membership.set(second.record())
        await until(lambda: running.parts.workers.num_sessions_up == 1)
        assert (await http.post("/v1/completions", json=BODY)).status_code == 503
        await second.stop()


async def test_a_worker_that_leaves_the_registry_finishes_what_it_has(make_worker, sentence):
    worker = make_worker(lambda request: Script([[token] for token in sentence[:4]], pause_s=0.05))
    async with running_router(CONFIG, worker) as running, client(running) as http:
        asking = asyncio.create_task(http.post("/v1/completions", json=BODY))
        await until(lambda: worker.requests)
        running.membership.set()
        assert (await asking).status_code == 200
        await until(lambda: running.parts.workers.num_sessions_up == 0)


async def test_of_two_tokenizers_of_one_name_no_worker_gets_the_other_s_tokens(make_worker, fallback_directory):
    class Revised(FakeWorker):
        """Of another revision: other weights, another tokenizer."""

        def record(self, role="decode"):
            return msgspec.structs.replace(super().record(role), model_fingerprint="cd34")

    old = make_worker()
    new = [Revised(old.reply, model_path=str(fallback_directory)) for _ in range(2)]
    tokens = {path: ModelTokenizer(Path(path)).encode(["x"], True)[0] for path in (old.model_path, new[0].model_path)}
    async with running_router(CONFIG, old, *new) as running, client(running) as http:
        for _ in range(4):
            assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        assert (len(old.requests), sum(len(worker.requests) for worker in new)) == (0, 4)
        running.membership.set(old.record(), new[0].record())
        running.membership.set(old.record())
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
    for worker in (old, *new):
        assert all(list(order.prompt_token_ids) == tokens[worker.model_path] for order in worker.requests)
    assert len(old.requests) == 1


async def test_a_draining_worker_gets_nothing_new(make_worker):
    draining, other = make_worker(load=pb.Load(draining=True)), make_worker(load=pb.Load(num_running=9))
    async with running_router(CONFIG, draining, other) as running, client(running) as http:
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        assert (len(draining.requests), len(other.requests)) == (0, 1)
        running.membership.set(draining.record())
        response = await http.post("/v1/completions", json=BODY)
        assert response.status_code == 503
        assert "shutting down" in response.json()["error"]["message"]


async def test_a_worker_that_gives_a_request_up_by_itself_loses_it(make_worker):
    quitting = make_worker(lambda request: Script([], pb.FINISH_REASON_ABORT))
    other = make_worker(load=pb.Load(num_running=5))
    async with running_router(CONFIG, quitting, other) as running, client(running) as http:
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
    assert len(other.requests) == 1


async def test_concurrent_requests_spread_over_equal_workers(make_worker, sentence):
    permits = asyncio.Semaphore(0)
    workers = [make_worker(lambda request: Script([sentence[:4]], permits=permits)) for _ in range(2)]
    async with running_router(CONFIG, *workers) as running, client(running) as http:
        asking = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(8)]
        await until(lambda: sum(len(worker.requests) for worker in workers) == 8)
        permit(permits, 8)
        answers = await asyncio.gather(*asking)
    assert {answer.status_code for answer in answers} == {200}
    assert [len(worker.requests) for worker in workers] == [4, 4]


async def test_orders_name_the_prefill_workers_with_least_work_first(make_worker, sentence):
    permits = asyncio.Semaphore(0)
    decode = make_worker(lambda request: Script([sentence[:4]], permits=permits))
    prefills = [FakeWorker(endless(sentence), worker_id=f"prefill-{name}") for name in "ab"]
    records = tuple(worker.record("prefill") for worker in prefills)
    async with running_router(CONFIG, decode, extra_records=records) as running, client(running) as http:
        body = {**BODY, "prompt": list(range(30))}  # too long for the decode worker to prefill it by itself
        asking = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(2)]
        await until(lambda: len(decode.requests) == 2)
        permit(permits, 2)
        await asyncio.gather(*asking)
        first = [request.prefill_targets[0].worker_id for request in decode.requests]
        assert sorted(first) == ["prefill-a", "prefill-b"]
        target = decode.requests[0].prefill_targets[0]
        record = next(record for record in records if record.worker_id == target.worker_id)
        assert (target.incarnation, target.kv_address) == (record.incarnation, record.kv_address)
        assert all(worker.num_outstanding_tokens == 0 for worker in running.parts.workers.prefill_candidates())


async def test_the_waiting_room_is_bounded(make_worker):
    config = RouterConfig(max_concurrent_requests=1, max_queue=1)
    permits = asyncio.Semaphore(0)
    worker = make_worker(first_then(Script([[300]], permits=permits), endless([300])))
    async with running_router(config, worker) as running, client(running) as http:
        asking = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(3)]
        (done,), waiting = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        refused = done.result()
        assert refused.status_code == 429
        await until(lambda: worker.requests)  # the first has been admitted, and may be on its way still
        permit(permits, 1)
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
        assert int(refused.headers["retry-after"]) >= 1
        assert (await http.get("/load")).json()["server_load"] == 0


async def test_cut_streams_leave_nothing_behind(make_worker, sentence, tokenizer):
    worker = make_worker(lambda request: Script([[token] for token in sentence] * 8, pause_s=0.02))
    async with running_router(CONFIG, worker) as running:

        async def ask(number: int) -> tuple[str, ...]:
            """What each choice says; nothing if we cut the stream."""
            texts = ["", ""]
            async with client(running) as http:
                body = {**BODY, "max_tokens": 100, "stream": True, "n": 2}
                async with http.stream("POST", "/v1/completions", json=body) as response:
                    num_lines = 0
                    async for line in response.aiter_lines():
                        num_lines += bool(line)
                        if number % 3 == 0 and num_lines > number:
                            return ()
                        if line.startswith("data: {"):
                            for choice in json.loads(line[6:])["choices"]:
                                texts[choice["index"]] += choice["text"]
                    return tuple(texts)

        answers = await asyncio.gather(*(ask(number) for number in range(12)))
        # All the others are complete, in however many events.
        assert [bool(answer) for answer in answers] == [bool(number % 3) for number in range(12)]
        assert {text for answer in answers for text in answer} == {tokenizer.decode(sentence * 8)}
        await until(lambda: not worker.live and running.parts.admission.num_running == 0)
        # Eight sequences of the cut ones are aborted, but for those that had not begun.
        assert len(worker.requests) - len(worker.aborts) == 16
        assert all(candidate.num_outstanding == 0 for candidate in running.parts.workers.decode_candidates())


async def test_a_slow_reader_does_not_hold_the_others_up_and_gets_what_piled_up_at_once(
    make_worker, sentence, tokenizer
):
    worker = make_worker()
    async with running_router(CONFIG, worker) as running, client(running) as http:
        reads_on, finished = asyncio.Event(), asyncio.Event()
        bodies: list[bytes] = []

        async def send(message):
            if message["type"] == "http.response.body":
                bodies.append(message["body"])
                await reads_on.wait()

        messages = [{"type": "http.request", "body": json.dumps({**BODY, "max_tokens": 200, "stream": True}).encode()}]

        async def receive():
            if not messages:
                await finished.wait()
            return messages.pop() if messages else {"type": "http.disconnect"}

        endpoint = GenerateEndpoint(running.parts, CompletionBody, plan_completion, CompletionRenderer)
        state = {"request_id": "slow", "access": AccessRecord("POST", "/v1/completions", running.parts.clock())}
        serving = asyncio.create_task(endpoint({"headers": [], "state": state}, receive, send))
        await until(lambda: bodies and not worker.live)  # the worker is done, the client has read one event
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        reads_on.set()
        await serving
        finished.set()
    events = [event for body in bodies for event in body.decode().split("\n\n") if event.startswith("data: {")]
    chunks = [json.loads(event[6:])["choices"][0] for event in events]
    assert len(chunks) < 10
    assert chunks[-1]["finish_reason"] == "length"
    assert "".join(chunk["text"] for chunk in chunks) == tokenizer.decode((sentence * 200)[:200])
