"""The HTTP surface: status codes, shapes and headers, over a real connection."""

from __future__ import annotations

import asyncio
import json
import socket

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.v1 import worker_pb2 as pb

import services
from services.router.config import RouterConfig
from tests.router.fake_worker import FakeWorker, Script, endless, failing
from tests.router.harness import ThreadedRouter, running_router, until


@pytest.fixture(scope="module")
def http(router):
    with httpx.Client(base_url=router.base_url, timeout=60) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, object]:
    """The error, having checked OpenAI's shape."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert response.headers["x-request-id"]
    assert response.headers["content-type"].startswith("application/json")
    return body["error"]


def test_status_endpoints(http):
    assert http.get("/health").status_code == 200
    assert http.get("/ready").json() == {"status": "ready", "models": ["tiny"], "not_ready": {}}
    assert http.get("/version").json() == {"version": services.__version__}
    assert http.get("/load").json()["server_load"] == 0


def test_unknown_urls_and_methods(http):
    response = http.get("/v1/nothing")
    assert response.status_code == 404
    assert error_of(response)["code"] == "unknown_url"
    for method, url in (("GET", "/v1/completions"), ("POST", "/health"), ("DELETE", "/v1/chat/completions")):
        response = http.request(method, url)
        assert response.status_code == 405
        assert error_of(response)["code"] == "method_not_allowed"


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b"\xff",
        b"[" * 5000,
        b'{"a": "\\ud800"}',
    ],
)
def test_a_body_that_is_no_json_object(http, url, body):
    response = http.post(url, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error_of(response)


def test_another_content_type(http):
    response = http.post("/v1/completions", data={"prompt": "x"})
    assert response.status_code == 400
    assert "application/json" in error_of(response)["message"]
    assert http.post("/tokenize", content=b'{"prompt": "x"}').status_code == 200  # none at all is taken for JSON


def test_the_only_model_need_not_be_named(http):
    assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).json()["model"] == "tiny"


def test_tokenize_and_detokenize(http, tokenizer):
    answer = http.post("/tokenize", json={"model": "tiny", "prompt": "Hello world", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 256
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Hello world"}
    messages = [{"role": "user", "content": "hi"}]
    chat = http.post("/tokenize", json={"messages": messages}).json()
    assert tokenizer.decode(chat["tokens"], skip_special_tokens=False) == "<|user|>hi</s><|assistant|>"
    bare = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert bare["tokens"] == chat["tokens"][:-1]
    for url, body in (("/tokenize", {}), ("/detokenize", {"tokens": "x"}), ("/detokenize", {"tokens": [10**9]})):
        assert http.post(url, json=body).status_code == 400


def test_the_prompt_arrives_as_tokens_with_its_salt_and_id(http, worker, tokenizer):
    body = {"prompt": "the quick", "max_tokens": 2, "cache_salt": "s", "request_id": "r-1", "seed": 9}
    response = http.post("/v1/completions", json=body)
    (request,) = worker.requests
    assert list(request.prompt_token_ids) == tokenizer.encode(["the quick"], True)[0]
    assert (request.model, request.cache_salt, request.request_id) == ("tiny", "s", "r-1")
    assert (request.sampling.seed, request.sampling.max_tokens) == (9, 2)
    assert response.headers["x-request-id"] == "r-1"
    assert response.json()["id"] == "cmpl-r-1"


def test_a_request_id_that_could_forge_a_header_is_replaced(http):
    response = http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "x" * 200})
    assert response.headers["x-request-id"] != "x" * 200
    assert http.post("/v1/completions", json={"prompt": "x", "request_id": "a\r\nb"}).status_code == 400


def test_n_choices_are_orders_with_seeds_of_their_own(http, worker):
    http.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2, "seed": 7, "max_tokens": 1})
    assert [request.sampling.seed for request in worker.requests] == [7, 8, 7, 8]
    assert [request.request_id[-2:] for request in worker.requests] == ["-0", "-1", "-2", "-3"]


def test_chat_uses_the_rest_of_the_context_by_default(http, worker):
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    usage = answer["usage"]
    assert usage["total_tokens"] == 256
    assert worker.requests[0].sampling.max_tokens == usage["completion_tokens"]


def test_the_end_of_sequence_token_does_not_show(http, worker, tokenizer):
    eos = tokenizer.encode(["</s>"], False)[0][0]
    text = tokenizer.encode(["How are"], False)[0]
    worker.reply = endless(text, eos_token_id=eos)
    body = {"prompt": "x", "max_tokens": 50, "return_token_ids": True, "skip_special_tokens": False}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == "How are"
    assert choice["token_ids"] == [*text, eos]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


def test_the_tokenizer_s_end_of_sequence_is_one_though_the_model_s_configuration_names_another(http, worker, tokenizer):
    eos = tokenizer.eos_token_id
    worker.reply = lambda request: Script([[70, eos]], pb.FINISH_REASON_STOP, stop_token_id=eos)
    choice = http.post("/v1/completions", json={"prompt": "x", "stop_token_ids": [70]}).json()["choices"][0]
    assert list(worker.requests[-1].sampling.stop_token_ids) == [70, eos]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (tokenizer.decode([70]), "stop", None)
    http.post("/v1/completions", json={"prompt": "x", "ignore_eos": True})
    assert list(worker.requests[-1].sampling.stop_token_ids) == []


def test_a_stop_token_is_named(http, worker, tokenizer):
    text = tokenizer.encode(["How are"], False)[0]
    worker.reply = lambda request: Script([text], pb.FINISH_REASON_STOP, stop_token_id=text[-1])
    body = {"prompt": "x", "stop_token_ids": [text[-1]]}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["text"] == tokenizer.decode(text[:-1])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", text[-1])
    shown = http.post("/v1/completions", json={**body, "include_stop_str_in_output": True}).json()["choices"][0]
    assert shown["text"] == "How are"


def test_a_stop_string_ends_the_request_at_the_worker_and_the_answer_at_its_token(http, router, worker, tokenizer):
    tokens = tokenizer.encode(["Hello world! How are you today?"], False)[0]
    worker.reply = lambda request: Script([tokens], pb.FINISH_REASON_UNSPECIFIED)  # all at once, and then goes on
    body = {"prompt": "x", "stop": "How", "max_tokens": 100, "logprobs": 0, "return_token_ids": True}
    answer = http.post("/v1/completions", json=body).json()
    choice = answer["choices"][0]
    assert choice["text"] == "Hello world! "
    assert "How" in tokenizer.decode(choice["token_ids"])
    assert "How" not in tokenizer.decode(choice["token_ids"][:-1])
    assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"]) == answer["usage"]["completion_tokens"]
    router.call(worker.wait_for_abort(1))


def test_stop_strings_wait_for_min_tokens(http, worker, tokenizer):
    token = tokenizer.encode(["a"], False)[0][0]
    worker.reply = endless([token], tokens_per_frame=4)
    body = {"prompt": "x", "stop": "a", "min_tokens": 6, "max_tokens": 20, "return_token_ids": True}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], len(choice["token_ids"])) == ("a" * 6, 7)


def test_a_stop_string_that_begins_within_min_tokens_ends_the_answer_behind_them(http, worker, tokenizer):
    a, b = tokenizer.encode(["a"], False)[0][0], tokenizer.encode(["b"], False)[0][0]
    worker.reply = endless([a, b])
    body = {"prompt": "x", "stop": "ab", "min_tokens": 3, "max_tokens": 20, "return_token_ids": True}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], len(choice["token_ids"]), choice["finish_reason"]) == ("ab", 4, "stop")


def test_usage_tells_cached_tokens(http, worker):
    worker.reply = lambda request: Script([[300]], num_cached_tokens=17)
    usage = http.post("/v1/completions", json={"prompt": ["x", "y"], "n": 2}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 34}
    assert usage["completion_tokens"] == 4


def test_prompt_logprobs_as_vllm_gives_them(http):
    body = {"prompt": "the quick", "prompt_logprobs": 2, "max_tokens": 1}
    answer = http.post("/v1/completions", json=body).json()
    first, *rest = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert len(rest) == answer["usage"]["prompt_tokens"] - 1
    assert all(set(entry) == {"logprob", "rank", "decoded_token"} for position in rest for entry in position.values())
    chat = {"messages": [{"role": "user", "content": "x"}], "prompt_logprobs": 0, "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=chat).json()["prompt_logprobs"][0] is None
    assert http.post("/v1/completions", json={**body, "stream": True}).status_code == 400


def test_tokens_as_token_ids(http, sentence):
    body = {"prompt": "x", "logprobs": 0, "max_tokens": 1, "return_tokens_as_token_ids": True}
    logprobs = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{sentence[0]}"]


# ---- streams ------------------------------------------------------------------


def events_of(http, url, body) -> list[str]:
    with http.stream("POST", url, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        raw = response.read().decode()
    assert raw.endswith("\n\n")
    return raw[:-2].split("\n\n")


def test_a_stream_is_events_and_done(http):
    *events, done = events_of(http, "/v1/completions", {"prompt": "x", "max_tokens": 4})
    assert done == "data: [DONE]"
    assert len(events) == 4  # one per frame
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        assert chunk["object"] == "text_completion"


def test_several_tokens_in_a_frame_are_one_event(http, worker, sentence):
    worker.reply = endless(sentence, tokens_per_frame=5)
    *events, _ = events_of(http, "/v1/completions", {"prompt": "x", "max_tokens": 10})
    assert len(events) == 2


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_tokens_without_text_are_events_too(http, worker, tokenizer, url, body):
    """Measuring clients time tokens by events: the four bytes of one character, then a special token."""
    pieces = tokenizer.encode(["\U0001f600"], False)[0]
    (special,) = tokenizer.encode(["</s>"], False)[0]
    assert len(pieces) > 1
    worker.reply = endless([*pieces, special])
    *events, _ = events_of(http, url, {**body, "max_tokens": len(pieces) + 1})
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    texts = [choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices]
    texts = texts[-len(pieces) - 1 :]  # a chat has opened with its role
    assert texts == [""] * (len(pieces) - 1) + ["\U0001f600", ""]


def test_a_chat_stream_starts_with_the_role_of_every_choice(http):
    body = {"messages": [{"role": "user", "content": "x"}], "n": 2, "max_tokens": 2}
    *events, _ = events_of(http, "/v1/chat/completions", body)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert [chunk["choices"][0]["index"] for chunk in chunks[:2]] == [0, 1]
    assert sum(chunk["choices"][0]["finish_reason"] == "length" for chunk in chunks) == 2


async def test_an_idle_stream_is_kept_alive_by_comments(make_worker, sentence):
    permits = asyncio.Semaphore(0)
    worker = make_worker(lambda request: Script([sentence[:1], sentence[1:2]], permits=permits))
    async with (
        running_router(RouterConfig(sse_keepalive_s=0.02), worker) as running,
        httpx.AsyncClient(base_url=running.base_url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as response,
    ):
        lines = response.aiter_lines()
        for _ in range(2):  # before the first token, and between two
            assert [await anext(lines) for _ in range(4)] == [": keep-alive", ""] * 2
            permits.release()
            while not (await anext(lines)).startswith("data: {"):
                pass
            assert await anext(lines) == ""
        assert [line async for line in lines if line not in (": keep-alive", "")] == ["data: [DONE]"]


def test_a_stream_that_fails_ends_with_an_error_and_no_done(http, worker):
    worker.reply = failing(pb.ERROR_CODE_INTERNAL, "burst", after=[[300]])
    *_, last = events_of(http, "/v1/completions", {"prompt": "x"})
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "burst"


def test_a_client_that_hangs_up_while_waiting_aborts(router, worker):
    """Without streaming, nothing is ever sent that could fail: the router must notice by itself."""
    worker.reply = lambda request: Script([], pb.FINISH_REASON_UNSPECIFIED)
    url = httpx.URL(f"{router.base_url}/v1/completions")
    body = json.dumps({"prompt": ["x", "y"], "n": 2}).encode()
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        head = f"POST {url.path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        router.call(until(lambda: len(worker.requests) == 4))
    router.call(worker.wait_for_abort(4))
    with httpx.Client(base_url=router.base_url, timeout=60) as http:
        assert http.get("/load").json()["server_load"] == 0
        metrics = http.get("/metrics").text
    assert 'vllm:num_requests_waiting{model_name="tiny",role="router"} 0.0' in metrics


# ---- metrics --------------------------------------------------------------------


def sample(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


def test_metrics_count_requests_and_tokens(http):
    before = http.get("/metrics").text
    http.post("/v1/completions", json={"prompt": "x", "max_tokens": 7})
    http.post("/v1/completions", json={"prompt": "x", "max_tokens": -1})
    after = http.get("/metrics").text
    grown = {
        'vllm:request_success_total{finished_reason="length",model_name="tiny",role="router"}': 1,
        "vllm:generation_tokens_total": 7,
        "vllm:time_to_first_token_seconds_count": 1,
        "vllm:inter_token_latency_seconds_count": 6,
        "vllm:e2e_request_latency_seconds_count": 1,
        "vllm:request_generation_tokens_sum": 7,
        'tandem:router_errors_total{status="400"}': 1,
    }
    assert {name: sample(after, name) - sample(before, name) for name in grown} == grown
    assert sample(after, "tandem:router_sessions_up") == 1
    assert sample(after, 'tandem:router_workers_known{role="decode"}') == 1
    assert sample(after, "vllm:num_requests_running") == 0


# ---- another configuration ---------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(model_directory, sentence):
    config = RouterConfig(
        api_key=("key-one", "schlüssel"),
        max_body_bytes=2000,
        allowed_origins=("https://chat.example",),
        request_timeout_s=0.5,
    )
    names = ("org/tiny-model", "alias")

    def workers():
        return [FakeWorker(endless(sentence), model_names=names, model_path=str(model_directory))]

    with ThreadedRouter(config, workers) as threaded, httpx.Client(base_url=threaded.base_url, timeout=60) as client:
        yield threaded, client


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode()}


def test_a_key_is_needed_where_answers_are(guarded):
    _, http = guarded
    for headers in ({}, bearer("wrong"), bearer("key-one2"), {"authorization": "Basic key-one"}):
        for method, url in (
            ("GET", "/v1/models"),
            ("POST", "/v1/completions"),
            ("POST", "/tokenize"),
            ("GET", "/v1/x"),
        ):
            response = http.request(method, url, headers=headers)
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"
    for key in ("key-one", "schlüssel"):
        assert http.get("/v1/models", headers=bearer(key)).status_code == 200
    for url in ("/health", "/ready"):
        assert http.get(url).status_code != 401
    for url in ("/version", "/metrics", "/load"):  # --public-routes names none by default
        assert http.get(url).status_code == 401


def test_model_names_may_hold_slashes(guarded):
    _, http = guarded
    listed = http.get("/v1/models", headers=bearer("key-one")).json()["data"]
    assert [entry["id"] for entry in listed] == ["alias", "org/tiny-model"]
    for url in ("/v1/models/org/tiny-model", "/v1/models/org%2Ftiny-model"):
        assert http.get(url, headers=bearer("key-one")).json()["id"] == "org/tiny-model"


def test_a_body_too_large(guarded):
    _, http = guarded
    response = http.post("/v1/completions", json={"prompt": "x" * 3000}, headers=bearer("key-one"))
    assert response.status_code == 413
    chunks = (b"x" * 1000 for _ in range(5))  # without a Content-Length
    headers = {**bearer("key-one"), b"content-type": b"application/json"}
    assert http.post("/v1/completions", content=chunks, headers=headers).status_code == 413


def test_browsers_may_ask_from_the_origins_allowed(guarded):
    _, http = guarded
    asked = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    response = http.options("/v1/completions", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://chat.example"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended_everywhere(guarded, stream):
    threaded, http = guarded
    worker = threaded.running.workers[0]
    original, worker.reply = worker.reply, lambda request: Script([], pb.FINISH_REASON_UNSPECIFIED)
    worker.aborts.clear()
    body = {"model": "alias", "prompt": "x", "stream": stream}
    response = http.post("/v1/completions", json=body, headers=bearer("key-one"))
    worker.reply = original
    assert response.status_code == 504
    assert "0.5 s" in error_of(response)["message"]
    threaded.call(worker.wait_for_abort(1))


# ---- garbage ------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = st.sampled_from(
    [
        "prompt", "messages", "model", "max_tokens", "temperature", "n", "stop", "logprobs", "echo", "stream", "tools",
        "stream_options", "logit_bias", "seed", "chat_template_kwargs", "tokens", "request_id", "response_format",
        "min_tokens", "allowed_token_ids", "prompt_logprobs", "add_generation_prompt", "return_token_ids", "documents",
    ]
)  # fmt: skip
URLS = st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
SENSIBLE = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "tokens": [5], "max_tokens": 2}


@settings(max_examples=80, deadline=None)
@given(url=URLS, fields=st.dictionaries(FIELDS, VALUES, min_size=1, max_size=4), bare=st.booleans())
def test_garbage_never_gets_a_5xx(http, url, fields, bare):
    response = http.post(url, json=fields if bare else {**SENSIBLE, **fields})
    if response.status_code != 200:
        assert 400 <= response.status_code < 500
        error_of(response)
    elif "text/event-stream" in response.headers["content-type"]:
        assert response.text.endswith("data: [DONE]\n\n")


@settings(max_examples=40, deadline=None)
@given(url=URLS, body=st.binary(max_size=60))
def test_noise_never_gets_a_5xx(http, url, body):
    response = http.post(url, content=body, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500
    error_of(response)
