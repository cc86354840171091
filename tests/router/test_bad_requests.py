"""Bad requests by name: each is refused in OpenAI's shape, or answered where it is valid, and the router serves on."""

from __future__ import annotations

import contextlib
import json
import socket

import httpx
import pytest

from services.router.edge import http as edge_http
from tests.router.tiny_model import byte_level_tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
VOCABULARY, CONTEXT = byte_level_tokenizer().get_vocab_size(), 256
NUM_ERRORS = 12_000
NAMED_BY_CLIENTS = {"request_id", "model", "priority", "cache_salt"}
"""Fields of an order that a client may give; of the others our test gives all."""


def text(**fields: object) -> bytes:
    return json.dumps({"prompt": "x", "max_tokens": 2, **fields}).encode()


def chat(**fields: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **fields}).encode()


# Name: path, body, statuses that it may get, the field that is named.
CASES: dict[str, tuple[str, bytes, set[int], str | None]] = {
    "a list": (COMPLETIONS, b"[]", {400}, None),
    "empty": (COMPLETIONS, b"", {400}, None),
    "null": (COMPLETIONS, b"null", {400}, None),
    "an empty object": (CHAT, b"{}", {400}, "messages"),
    "100,000 lists deep": (COMPLETIONS, b"[" * 100_000, {400}, None),
    "100,000 objects deep": (COMPLETIONS, b'{"prompt":' * 100_000, {400}, None),
    "deep in a field that may be anything": (CHAT, chat(tools=[]).replace(b"[]", b"[" * 900 + b"]" * 900), {400}, None),
    "deep template variables": (CHAT, chat(chat_template_kwargs=0).replace(b"0", b"[" * 9000, 1), {400}, None),
    "a seed of 5,000 digits": (COMPLETIONS, text(seed=0).replace(b'"seed": 0', b'"seed": ' + b"9" * 5000), {400}, None),
    "a seed of 64 bits and more": (COMPLETIONS, text(seed=2**64), {400}, "seed"),
    "NaN": (COMPLETIONS, b'{"prompt": "x", "temperature": NaN}', {400}, None),
    "Infinity": (COMPLETIONS, b'{"prompt": "x", "temperature": Infinity}', {400}, None),
    "1e400": (COMPLETIONS, b'{"prompt": "x", "temperature": 1e400}', {400}, None),
    "-1e400": (COMPLETIONS, b'{"prompt": "x", "presence_penalty": -1e400}', {400}, None),
    "true for a number": (COMPLETIONS, text(max_tokens=True), {400}, "max_tokens"),
    "a number for text": (COMPLETIONS, text(prompt=5), {400}, "prompt"),
    "a lone surrogate": (COMPLETIONS, b'{"prompt": "\\ud800", "max_tokens": 1}', {400}, None),
    "a lone surrogate in a message": (CHAT, b'{"messages": [{"role": "user", "content": "\\udfff"}]}', {400}, None),
    "a lone surrogate in the model's name": (COMPLETIONS, b'{"prompt": "x", "model": "\\ud800"}', {400, 404}, None),
    "a lone surrogate in a salt": (COMPLETIONS, b'{"prompt": "x", "cache_salt": "\\ud800"}', {200, 400}, None),
    "a lone surrogate in a stop": (
        COMPLETIONS,
        b'{"prompt": "x", "max_tokens": 1, "stop": "\\ud800"}',
        {200, 400},
        None,
    ),
    "no UTF-8": (COMPLETIONS, b'{"prompt": "\xff\xfe"}', {400}, None),
    "NUL in a prompt": (COMPLETIONS, text(prompt="a\0b"), {200}, None),
    "NUL in the model's name": (COMPLETIONS, text(model="a\0b"), {404}, "model"),
    "NUL bytes": (COMPLETIONS, b"\0" * 1000, {400}, None),
    "a megabyte of emoji": (COMPLETIONS, text(prompt="\U0001f642" * 262_144), {400}, "prompt"),
    "a megabyte of emoji in a chat": (
        CHAT,
        chat(messages=[{"role": "user", "content": "\U0001f642" * 262_144}]),
        {400},
        "messages",
    ),
    "a megabyte of spaces": (COMPLETIONS, text(prompt=" " * 1_000_000), {400}, "prompt"),
    "too large": (COMPLETIONS, b" " * (8 << 20) + text(), {413}, None),
    "unknown model": (COMPLETIONS, text(model="nothing"), {404}, "model"),
    "a model's name of a megabyte": (COMPLETIONS, text(model="x" * 1_000_000), {404}, "model"),
    "n of a billion": (COMPLETIONS, text(n=10**9), {400}, "n"),
    "n of none": (COMPLETIONS, text(n=0), {400}, "n"),
    "100,000 prompts": (COMPLETIONS, text(prompt=["x"] * 100_000), {400}, "prompt"),
    "8,192 sequences": (COMPLETIONS, text(prompt=["x"] * 64, n=128), {400}, "n"),
    "an empty prompt": (COMPLETIONS, text(prompt=""), {400}, "prompt"),
    "no prompts": (COMPLETIONS, text(prompt=[]), {400}, "prompt"),
    "an empty list of ids": (COMPLETIONS, text(prompt=[[]]), {400}, "prompt"),
    "prompts of two kinds": (COMPLETIONS, text(prompt=["x", 5]), {400}, "prompt"),
    "prompts three lists deep": (COMPLETIONS, text(prompt=[[[5]]]), {400}, "prompt"),
    "no messages": (CHAT, chat(messages=[]), {400}, "messages"),
    "a message that is nothing": (CHAT, chat(messages=[{}]), {400}, "messages[0].role"),
    "a message that is no object": (CHAT, chat(messages=["x"]), {400}, "messages"),
    "a role that is no text": (CHAT, chat(messages=[{"role": ["user"], "content": "x"}]), {400}, "messages[0].role"),
    "an id below 0": (COMPLETIONS, text(prompt=[-1]), {400}, "prompt"),
    "the first id beyond the vocabulary": (COMPLETIONS, text(prompt=[VOCABULARY]), {400}, "prompt"),
    "the last id of the vocabulary": (COMPLETIONS, text(prompt=[VOCABULARY - 1]), {200}, None),
    "an id beyond 64 bits": (COMPLETIONS, text(prompt=[2**70]), {400}, "prompt"),
    "an id with a fraction": (COMPLETIONS, text(prompt=[1.5]), {400}, "prompt"),
    "a prompt over the context": (COMPLETIONS, text(prompt=[5] * (CONTEXT + 1)), {400}, "prompt"),
    "a million ids": (COMPLETIONS, text(prompt=[5] * 1_000_000), {400}, "prompt"),
    "a million and more ids": (COMPLETIONS, text(prompt=[5] * 1_100_000), {400}, None),
    "a million lists": (COMPLETIONS, text(prompt=[[]] * 1_000_000), {400}, None),
    "more tokens than fit": (COMPLETIONS, text(max_tokens=10**6), {400}, "max_tokens"),
    "max_tokens below 0": (COMPLETIONS, text(max_tokens=-1), {400}, "max_tokens"),
    "max_tokens of 0": (COMPLETIONS, text(max_tokens=0), {400}, "max_tokens"),
    "min over max tokens": (COMPLETIONS, text(min_tokens=3), {400}, "min_tokens"),
    "seventeen stops": (COMPLETIONS, text(stop=list("abcdefghijklmnopq")), {400}, "stop"),
    "five stops": (COMPLETIONS, text(stop=list("abcde")), {200}, None),
    "an empty stop": (COMPLETIONS, text(stop=["a", ""]), {400}, "stop"),
    "a stop of 2,000 characters": (COMPLETIONS, text(stop="x" * 2000), {400}, "stop"),
    "logprobs over the limit": (COMPLETIONS, text(logprobs=21), {400}, "logprobs"),
    "top_logprobs over the limit": (CHAT, chat(logprobs=True, top_logprobs=21), {400}, "top_logprobs"),
    "top_logprobs without logprobs": (CHAT, chat(top_logprobs=2), {400}, "top_logprobs"),
    "prompt_logprobs over the limit": (COMPLETIONS, text(prompt_logprobs=21), {400}, "prompt_logprobs"),
    "logit_bias over the limit": (COMPLETIONS, text(logit_bias={"5": 101}), {400}, "logit_bias"),
    "logit_bias of a word": (COMPLETIONS, text(logit_bias={"word": 1}), {400}, "logit_bias"),
    "logit_bias of no token": (COMPLETIONS, text(logit_bias={"1000000": 1}), {400}, "logit_bias"),
    "logit_bias below 0": (COMPLETIONS, text(logit_bias={"-1": 1}), {400}, "logit_bias"),
    "logit_bias of a list": (COMPLETIONS, text(logit_bias=[1]), {400}, "logit_bias"),
    "allowed_token_ids of none": (COMPLETIONS, text(allowed_token_ids=[]), {400}, "allowed_token_ids"),
    "allowed_token_ids of no token": (COMPLETIONS, text(allowed_token_ids=[10**6]), {400}, "allowed_token_ids"),
    "500,000 allowed_token_ids": (COMPLETIONS, text(allowed_token_ids=[5] * 500_000), {200}, None),
    "a salt of 129 characters": (COMPLETIONS, text(cache_salt="x" * 129), {200}, None),
    "a salt of 1,025 characters": (COMPLETIONS, text(cache_salt="x" * 1025), {400}, "cache_salt"),
    "an empty salt": (COMPLETIONS, text(cache_salt=""), {400}, "cache_salt"),
    "stream_options without stream": (
        COMPLETIONS,
        text(stream_options={"include_usage": True}),
        {400},
        "stream_options",
    ),
    "a request id of two lines": (COMPLETIONS, text(request_id="a\r\nb"), {400}, "request_id"),
    "a template of the client's": (CHAT, chat(chat_template="{{ 1 }}"), {400}, "chat_template"),
    "variables that hide the messages": (
        CHAT,
        chat(chat_template_kwargs={"messages": 5, "add_generation_prompt": []}),
        {200},
        None,
    ),
    "12,000 wrong messages": (
        CHAT,
        chat(messages=[{"role": 5, "content": "x" * 9}] * NUM_ERRORS),
        {400},
        "messages",
    ),
    "12,000 wrong parts": (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": 5, "text": 5}] * NUM_ERRORS}]),
        {400},
        "messages[0].content[0]",
    ),
    "12,000 wrong ids": (COMPLETIONS, text(prompt=[10**6] * NUM_ERRORS), {400}, "prompt"),
    "12,000 wrong fields": (
        COMPLETIONS,
        json.dumps({f"x{i}": None for i in range(NUM_ERRORS)}).encode(),
        {400},
        "prompt",
    ),
    "12,000 wrong biases": (COMPLETIONS, text(logit_bias={f"x{i}": 0 for i in range(NUM_ERRORS)}), {400}, "logit_bias"),
}


def check_refusal(response: httpx.Response) -> dict[str, object]:
    assert len(response.content) < 20_000
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert response.headers["x-request-id"]
    return body["error"]


@pytest.fixture(scope="module")
def http(router):
    with httpx.Client(base_url=router.base_url, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def _serves_on(http, worker):
    yield
    assert http.post(COMPLETIONS, content=text()).status_code == 200


@pytest.mark.parametrize("name", CASES)
def test_a_bad_body(http, name):
    path, body, statuses, param = CASES[name]
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in statuses, response.text[:500]
    if response.status_code != 200:
        error = check_refusal(response)
        assert param is None or error["param"] == param


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, text), (CHAT, chat)], ids=["completions", "chat"])
def test_fields_of_our_insides_reach_no_order(http, worker, path, body):
    inside = {
        "handle": 4_000_000,
        "timeout_s": 0.001,
        "transfer_id": "x",
        "kv_transfer_params": {"do_remote_prefill": True},
        "move": {"worker_id": "w", "kv_address": "localhost:1", "transfer_id": "x"},
        "prefill_targets": [{"worker_id": "w", "grpc_address": "localhost:1", "kv_address": "localhost:1"}],
        "prefix_sources": [{"holder_id": "w", "kv_address": "localhost:1", "num_blocks": 1}],
        "prompt_hashes": {"hashes": ["x"]},
        "prompt_token_ids": [1, 2, 3],
        "adapter": "another:0123",
        "tpot_objective_s": 0.001,
        "resumed_token_ids": [5],
        "sampling": {"max_tokens": 99},
        "token_lists": 5,
        "tenant": "another",
    }
    orders = []
    for fields in ({}, inside):
        response = http.post(path, content=body(seed=7, request_id="r", cache_salt="s", **fields))
        assert response.status_code == 200, response.text[:500]
        orders.append(worker.requests[-1])
    plain, ours = orders
    assert plain.prompt_token_ids
    assert ours.handle == plain.handle + 1
    assert ours.timeout_s > 1  # what is left of our own
    ours.handle, ours.timeout_s = plain.handle, plain.timeout_s
    assert ours == plain
    assert set(inside) >= {field.name for field in ours.DESCRIPTOR.fields} - NAMED_BY_CLIENTS


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_another_content_type(http, kind):
    response = http.post(COMPLETIONS, content=text(), headers={"content-type": kind})
    assert response.status_code == 400
    assert "application/json" in str(check_refusal(response)["message"])


def test_300_headers(http):
    response = http.post(COMPLETIONS, content=text(), headers=[(f"x-{i}", "x") for i in range(300)])
    assert response.status_code == 431
    assert response.json()["error"]["message"]


def test_a_body_that_does_not_come(http, monkeypatch):
    monkeypatch.setattr(edge_http, "_BODY_SILENCE_S", 0.05)
    url = httpx.URL(str(http.base_url))
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        answer = b""
        while chunk := connection.recv(1000):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in answer


def test_a_body_that_comes_a_byte_at_a_time_has_its_time_in_all(http, monkeypatch):
    monkeypatch.setattr(edge_http, "_BODY_TIMEOUT_S", 0.5)
    monkeypatch.setattr(edge_http, "_BODY_SILENCE_S", 60)
    url = httpx.URL(str(http.base_url))
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n{")
        connection.settimeout(0.02)
        for _ in range(300):  # six seconds or more; a byte each, which no silence interrupts
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(1000)
                break
            connection.sendall(b" ")
        else:
            pytest.fail("bytes without end have time without end")
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_is_more_than_it_says(http):
    url = httpx.URL(str(http.base_url))
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        body = text()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body + b"}}}")
        )
        answers = b""
        while chunk := connection.recv(10_000):
            answers += chunk
    assert answers.startswith(b"HTTP/1.1 200 OK")  # and the rest is no request
