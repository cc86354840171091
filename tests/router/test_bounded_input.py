"""What a request may take before it is known to be one: values, characters, tokens, memory; and what is given back."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import tracemalloc
from array import array
from unittest import mock

import httpx
import orjson
import pytest
from hypothesis import given, strategies
from tandem.v1 import worker_pb2 as pb

from kvstore.threads import OsThreads
from services.router.config import RouterConfig
from services.router.edge import GenerateEndpoint, RequestMemory
from services.router.edge import http as http_edge
from services.router.edge.access import AccessRecord
from services.router.edge.memory import SMALL_BYTES
from services.router.errors import ApiError, model_not_found
from services.router.fleet import Dispatch, Placer
from services.router.openai import CompletionRenderer, SizeLimits, check_sizes, completions, plan_completion, sizes
from services.router.openai.bodies import ChatBody, CompletionBody
from services.router.openai.columns import Column, default, in_pieces
from services.router.openai.decoding import decode
from services.router.text import ModelTokenizer, PromptTooLong, WorkStopped
from services.router.text import tokenizer as tokenizer_module
from tests.router.fake_worker import Script, permit
from tests.router.harness import running_router, until

URL = "/v1/completions"


def client(running, **options) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=running.base_url, timeout=60, **options)


# ---- bodies -----------------------------------------------------------------


@pytest.mark.parametrize("prompt", [[5] * 40, [[]] * 20, [[5]] * 20], ids=["ids", "lists", "both"])
def test_values_are_counted_before_they_become_objects(monkeypatch, prompt):
    monkeypatch.setattr(sizes, "MAX_VALUES", 30)
    monkeypatch.setattr(sizes, "MAX_CONTAINERS", 10)
    monkeypatch.setattr(sizes.msgspec.json, "decode", lambda *args, **kwargs: pytest.fail("it was decoded"))
    with pytest.raises(ApiError, match="too many values: 30") as caught:
        decode(json.dumps({"prompt": prompt}).encode(), CompletionBody)
    assert caught.value.status == 400


def test_what_stands_in_strings_is_no_value(monkeypatch):
    monkeypatch.setattr(sizes, "MAX_VALUES", 30)
    monkeypatch.setattr(sizes, "MAX_CONTAINERS", 10)
    text = 'a "quoted\\", [text], {with} ' * 50
    assert decode(json.dumps({"prompt": text}).encode(), CompletionBody).prompt == text


NUM_TOKENS, NUM_PROMPTS = 100, 8
LIMITS = SizeLimits(NUM_TOKENS, chars_per_token=10)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": [5] * 101}, "maximum context length is 100 tokens"),
        ({"prompt": [[5] * 200, [6, 7]]}, "maximum context length is 100 tokens"),
        ({"prompt": [[5]] * 9}, "9 prompts"),
        ({"prompt": ["a, [b]"] * 9}, "9 prompts"),
        ({"messages": [{"role": "user", "content": "[,"}] * 101}, "maximum context length is 100 tokens"),
        ({"prompt": "a" * 1001}, "requested at least 101 tokens"),
        ({"prompt": "ä🙂" * 561 + "\n" * 30}, "at least 101 tokens"),
        ({"tokens": [5] * 101}, "`tokens` has 101 tokens; 100 are taken"),
        ({"prompt": [5], "model": "nobody"}, "model `nobody`"),
    ],
    ids=["ids", "lists", "too many lists", "too many texts", "messages", "text", "characters", "tokens", "model"],
)
def test_what_no_model_takes_is_refused_by_the_bytes_of_its_fields(body, words):
    def limit(name):
        if name is not None:
            raise ApiError(404, f"no model `{name}`")
        return LIMITS

    with pytest.raises(ApiError, match=words.replace("`", ".")):
        check_sizes(json.dumps(body, ensure_ascii=False).encode(), limit, NUM_PROMPTS)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [5] * 100},
        {"prompt": [[5] * 100] * 8},
        {"prompt": ['a, "[b]"\\', ",,,[[["] * 4},
        {"prompt": "a" * 1000},
        {"prompt": "\x01🙂" * 500},
        {"prompt": {"a": 1}},
        {"messages": [{"role": "user", "content": ["," * 1000]}] * 100, "model": None},
        {"messages": 7, "prompt": [5] * 1000},
        {"tokens": [5] * 100, "model": 7},
        [1, 2],
    ],
)
def test_what_may_fit_or_is_of_another_type_is_left_to_the_decoder(body):
    check_sizes(json.dumps(body).encode(), lambda name: LIMITS, NUM_PROMPTS)


@pytest.mark.parametrize("content", [b"[" * 60_000, b'{"prompt": [', b"\xff", b""])
def test_what_is_no_json_is_left_to_the_decoder(content):
    check_sizes(content, lambda name: LIMITS, NUM_PROMPTS)


@pytest.mark.parametrize(
    "content",
    [
        b'{"messages":[%s1]}' % (b"1," * 100_000),
        b'{"messages":[%s{}]}' % (b"{}," * 40_000),
        b"{%s}" % b",".join(b'"%x":1' % number for number in range(100_000)),
        b'{"messages":[%s{}]}' % (b'{"a":[1,{}]},' * 20_000),
        b'{"user":"%s"}' % (rb"\"\\" * 1_000_000),
        b'{"prompt":"%s"}' % (b"x" * 400_000),
    ],
    ids=["numbers", "messages", "fields", "messages with parts", "escapes", "text"],
)
def test_sizes_are_looked_at_without_a_memory_of_their_own(content):
    tracemalloc.start()
    try:
        check_sizes(content, lambda name: SizeLimits(50_000, 10), NUM_PROMPTS)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 3 << 20


@pytest.mark.parametrize("content", [b'{"messages":[%s1]}' % (b"1," * 2_000_000), b'{"a":[%s1]}' % (b"{}," * 70_000)])
def test_a_body_with_too_many_values_is_not_even_looked_at(content, monkeypatch):
    monkeypatch.setattr(sizes.msgspec.json, "decode", lambda *args, **kwargs: pytest.fail("it was decoded"))
    with pytest.raises(ApiError, match="too many values"):
        check_sizes(content, lambda name: LIMITS, NUM_PROMPTS)


TEXTS = strategies.text('a",[{\\:')
VALUES = strategies.recursive(
    strategies.integers() | TEXTS,
    lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(TEXTS, inner, max_size=4),
)


@given(VALUES)
def test_values_are_counted_as_a_parser_would(value):
    def walk(value):
        """Commas, containers, strings."""
        if not isinstance(value, list | dict):
            return 0, 0, int(isinstance(value, str))
        parts = [walk(part) for part in (value.values() if isinstance(value, dict) else value)]
        own = max(len(value) - 1, 0), 1, len(value) if isinstance(value, dict) else 0
        return tuple(map(sum, zip(own, *parts, strict=True)))

    num_commas, num_containers, num_strings = walk(value)
    content = json.dumps(value).encode()
    with mock.patch.object(sizes, "_SLICE_BYTES", 7):
        assert sizes.count(content)[:3] == (num_commas, num_containers, num_strings > 0)
        assert sizes.count(content) == sizes.count(bytearray(content))


@given(strategies.text(strategies.characters() | strategies.sampled_from('\\"ud🙂\n')), strategies.booleans())
def test_a_text_has_no_fewer_characters_than_are_told(text, ensures_ascii):
    content = json.dumps(text, ensure_ascii=ensures_ascii).encode(errors="surrogatepass")
    with mock.patch.object(sizes, "_SLICE_BYTES", 7):
        assert sizes.fewest_chars(memoryview(content)) <= len(text)
        if text.isascii() and text.isalpha():
            assert sizes.fewest_chars(memoryview(content)) == len(text)


@pytest.mark.parametrize("ensures_ascii", [True, False])
@pytest.mark.parametrize(
    "value",
    [
        {"messages": [{"role": "user", "content": "x" * 50}] * 5000},
        ["x" * 300_000],
        ["🙂" + "x" * 300_000],
        ["x" * (1 << 18) + "\\🙂" * 20_000],
        ["你" + "x" * 300_000],
        list(range(1000, 100_000)),
        [[number] for number in range(1000, 20_000)],
        [{"type": "text", "text": str(number)} for number in range(20_000)],
    ],
    ids=["messages", "text", "emoji", "late emoji", "Chinese", "ids", "lists", "parts"],
)
def test_what_a_body_comes_to_takes_no_more_than_is_told(value, ensures_ascii):
    content = json.dumps(value, ensure_ascii=ensures_ascii).encode()
    tracemalloc.start()
    try:
        decoded = sizes.msgspec.json.decode(content)
        taken_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken_bytes <= sizes.count(content).decoded_bytes <= 4 * taken_bytes
    del decoded


async def test_a_large_body_that_no_model_takes_is_not_decoded(make_worker, monkeypatch):
    monkeypatch.setattr("services.router.edge.client.decode", lambda *args: pytest.fail("it was decoded"))
    async with running_router(RouterConfig(), make_worker()) as running, client(running) as http:
        ids = [5] * SMALL_BYTES
        for url, body in ((URL, {"prompt": ids}), ("/detokenize", {"tokens": ids * 4})):
            assert (await http.post(url, json=body)).status_code == 400
            assert (await http.post(url, json=body | {"model": "nobody"})).status_code == 404


def test_a_planned_request_holds_its_input_no_more():
    body = decode(b'{"messages": [{"role": "user", "content": "x"}], "allowed_token_ids": [5], "user": "x"}', ChatBody)
    body.drop_input()
    assert (body.messages, body.allowed_token_ids, body.user) == ([], None, None)


async def test_lists_of_tokens_are_as_long_as_the_vocabulary_at_most(make_worker):
    worker = make_worker()
    async with running_router(RouterConfig(), worker) as running, client(running) as http:
        repeated = [5, 6, 7] * 10_000
        body = {"prompt": "x", "max_tokens": 1, "n": 2, "allowed_token_ids": repeated, "stop_token_ids": repeated}
        assert (await http.post(URL, json=body)).status_code == 200
    for request in worker.requests:
        assert list(request.sampling.allowed_token_ids) == [5, 6, 7]
        assert list(request.sampling.stop_token_ids)[:3] == [5, 6, 7]
        assert len(request.sampling.stop_token_ids) <= 4


def test_an_error_quotes_a_part_of_what_the_client_wrote():
    assert len(model_not_found("x" * 1_000_000).body()) < 1000
    assert len(ApiError(400, "\x01" * 100_000, param="\x01" * 100_000).body()) < 20_000
    assert b"?" in ApiError(400, "a lone surrogate: \ud800").body()


@pytest.mark.parametrize("path", [f"/{'x' * 20_000}", f"/v1/models/{'x' * 20_000}"])
def test_no_answer_is_as_long_as_its_url(router, path):
    answer = httpx.get(router.base_url + path, timeout=60)
    assert answer.status_code == 404
    assert len(answer.content) < 1000


# ---- text --------------------------------------------------------------------


@pytest.fixture
def watched(tokenizer, monkeypatch):
    """The tokenizer, and the lengths of what it was given."""
    lengths: list[int] = []
    encode = ModelTokenizer.encode

    def watching(self, texts, add_special_tokens):
        lengths.extend(map(len, texts))
        return encode(self, texts, add_special_tokens)

    monkeypatch.setattr(ModelTokenizer, "encode", watching)
    return tokenizer, lengths


def encode_bounded(tokenizer, text, max_tokens, go_on=lambda: None):
    return tokenizer.encode_bounded(text, False, max_tokens, go_on)


def test_a_text_longer_than_any_that_fits_is_not_tokenized(watched):
    tokenizer, lengths = watched
    with pytest.raises(PromptTooLong) as caught:
        encode_bounded(tokenizer, "x" * (100 * tokenizer.max_chars_per_token + 1), 100)
    assert caught.value.at_least == 101
    assert lengths == []


def test_of_a_text_that_is_too_long_as_much_is_tokenized_as_shows_it(watched):
    tokenizer, lengths = watched
    text = "xyz, " * (1000 * tokenizer.max_chars_per_token // 5)
    with pytest.raises(PromptTooLong) as caught:
        encode_bounded(tokenizer, text, 1000)
    assert 1000 < caught.value.at_least <= len(tokenizer.encode([text], False)[0])
    assert lengths[0] < len(text)
    assert lengths == [lengths[0], len(text)]  # the second is the line above


@pytest.mark.parametrize("text", ["the quick brown fox jumps over the lazy dog. " * 40, "你好 🙂" * 9, "", " " * 200])
@pytest.mark.parametrize("max_tokens", [100, 500])
def test_what_fits_has_the_tokens_that_it_always_had(tokenizer, text, max_tokens):
    (whole,) = tokenizer.encode([text], False)
    if len(whole) <= max_tokens:
        assert list(encode_bounded(tokenizer, text, max_tokens)) == whole


def test_every_token_fits_the_bound_of_characters(tokenizer, fallback_tokenizer):
    for each in (tokenizer, fallback_tokenizer):
        names = [each.decode([token_id], skip_special_tokens=False) for token_id in range(each.vocab_size)]
        assert max(map(len, names)) <= each.max_chars_per_token


def test_tokenizing_stops_between_two_parts_once_the_client_has_gone(watched, monkeypatch):
    tokenizer, lengths = watched
    monkeypatch.setattr(tokenizer_module, "_LIKELY_CHARS", 1)
    turns = iter([None, None])

    def go_on():
        if next(turns, "gone") == "gone":
            raise WorkStopped

    with pytest.raises(WorkStopped):
        encode_bounded(tokenizer, "the quick brown fox " * 25, 100, go_on)
    assert lengths == [100, 200]


async def test_a_prompt_that_is_too_long_says_so_in_openais_words(make_worker):
    worker = make_worker()
    async with running_router(RouterConfig(), worker) as running, client(running) as http:
        for url, body, param in (
            (URL, {"prompt": "x, " * 20_000}, "prompt"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x, " * 20_000}]}, "messages"),
        ):
            refused = await http.post(url, json=body)
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
            assert "maximum context length is 256 tokens" in error["message"]
        assert worker.requests == []


# ---- memory --------------------------------------------------------------------


async def test_large_requests_share_a_bounded_memory_and_give_it_back():
    memory = RequestMemory(1000, 0.6, OsThreads())
    with memory.hold("a") as first:
        first.add(SMALL_BYTES)
        assert memory.num_bytes == 0
        first.add(500)
        with pytest.raises(ApiError, match="500 of them yours") as caught, memory.hold("a") as second:
            second.add(SMALL_BYTES + 101)
        assert caught.value.status == 429
        with memory.hold("b") as other:
            other.add(SMALL_BYTES + 500)
            with pytest.raises(ApiError), memory.hold("c") as third:
                third.add(SMALL_BYTES + 1)
    assert memory.num_bytes == 0
    await memory.close()


async def test_a_body_holds_memory_until_it_has_been_made_into_a_request(make_worker, sentence, monkeypatch):
    goes_on = threading.Event()
    permits = asyncio.Semaphore(0)
    worker = make_worker(lambda request: Script([sentence[:1]], permits=permits))
    encode = ModelTokenizer.encode

    def slow(self, texts, add_special_tokens):
        assert goes_on.wait(60)
        return encode(self, texts, add_special_tokens)

    monkeypatch.setattr(ModelTokenizer, "encode", slow)
    monkeypatch.setattr(completions, "SHORT_CHARS", 0)  # tokenized in a thread, all of it
    async with running_router(RouterConfig(request_memory_bytes=350_000), worker) as running, client(running) as http:
        padded = {"prompt": "x", "max_tokens": 1, "user": "x" * 150_000}
        first = asyncio.create_task(http.post(URL, json=padded))
        await until(lambda: running.parts.memory.num_bytes > 200_000)  # its bytes, and what they came to
        refused = await http.post(URL, json=padded)
        assert refused.status_code == 429
        goes_on.set()
        await until(lambda: worker.requests)
        assert running.parts.memory.num_bytes == 0  # while it runs
        permit(permits, 2)
        assert (await http.post(URL, json=padded)).status_code == 200
        assert (await first).status_code == 200
        assert running.parts.memory.num_bytes == 0
        assert 'tandem:router_refusals_total{reason="memory_full"} 1.0' in (await http.get("/metrics")).text


async def test_an_answer_in_one_piece_is_bounded_and_a_stream_is_not(make_worker):
    worker = make_worker()
    async with running_router(RouterConfig(request_memory_bytes=100_000), worker) as running, client(running) as http:
        body = {"prompt": "x", "max_tokens": 100, "n": 16, "logprobs": 20}
        assert (await http.post(URL, json=body)).status_code == 429
        stream = await http.post(URL, json={**body, "stream": True})
        assert stream.status_code == 200
        assert stream.text.endswith("data: [DONE]\n\n")
        assert running.parts.admission.num_running == running.parts.memory.num_bytes == 0


async def taken_by(running, body: dict[str, object], send=None, left_bytes=1 << 20) -> tuple[int, list[bytes]]:
    """Asks without HTTP. The most memory that it took, in bytes, and the answer's parts.

    A thread lets go of its work a moment later; then no more than `left_bytes` are left, or it raises.
    """
    endpoint = GenerateEndpoint(running.parts, CompletionBody, plan_completion, CompletionRenderer)
    content, finished, parts = json.dumps(body).encode(), asyncio.Event(), []
    places = iter(range(0, len(content), SMALL_BYTES))

    async def receive():
        if (start := next(places, None)) is None:
            await finished.wait()
            return {"type": "http.disconnect"}
        part = bytes(memoryview(content)[start : start + SMALL_BYTES])  # as the server, which has it from a socket
        return {"type": "http.request", "body": part, "more_body": start + SMALL_BYTES < len(content)}

    async def keep(message):
        if message["type"] == "http.response.body":
            parts.append(message["body"])

    state = {"request_id": "asked", "access": AccessRecord("POST", URL, running.parts.clock())}
    gc.collect()
    gc.disable()  # what lies in cycles stays for long
    running.parts.memory.trim_soon = lambda: None  # which collects, too
    tracemalloc.start()
    try:
        await endpoint({"headers": [], "state": state}, receive, send or keep)
        _, most_bytes = tracemalloc.get_traced_memory()
        await until(lambda: tracemalloc.get_traced_memory()[0] < left_bytes)
    finally:
        tracemalloc.stop()
        gc.enable()
        finished.set()
    return most_bytes, parts


async def test_a_text_that_is_too_long_takes_its_body_once_and_leaves_nothing(make_worker):
    length = 7_000_000
    async with running_router(RouterConfig(), make_worker()) as running:
        most_bytes, parts = await taken_by(running, {"prompt": "x" * length})
    assert b"maximum context length" in b"".join(parts)
    assert most_bytes < 1.2 * length + (2 << 20)


async def test_nothing_is_left_of_a_text_that_was_too_long_for_the_tokenizer(make_worker):
    text = "x, " * 1_000_000
    async with running_router(RouterConfig(), make_worker()) as running:
        _, parts = await taken_by(running, {"prompt": [text]})  # of which the length is found by a thread
    assert b"maximum context length" in b"".join(parts)


async def test_log_probabilities_take_the_memory_of_their_answer(make_worker):
    body = {"prompt": "x", "max_tokens": 100, "n": 8, "logprobs": 20}
    async with running_router(RouterConfig(), make_worker()) as running:
        most_bytes, parts = await taken_by(running, body)
    assert most_bytes < 2 * sum(map(len, parts)) + (1 << 20)


async def test_what_waits_for_a_client_that_reads_late_is_packed_and_comes_whole(make_worker, sentence, monkeypatch):
    reads, events, dispatches, arrive = asyncio.Event(), [], set(), Dispatch._arrive

    def watched(self, arrival):
        dispatches.add(self)
        arrive(self, arrival)

    async def send(message):
        if message["type"] == "http.response.body":
            events.append(message["body"])
            await reads.wait()

    monkeypatch.setattr(Dispatch, "_arrive", watched)
    async with running_router(RouterConfig(), make_worker()) as running:
        body = {"prompt": "x", "max_tokens": 200, "logprobs": 3, "stream": True}
        asking = asyncio.create_task(taken_by(running, body, send))
        await until(lambda: events and not running.parts.admission.num_running)
        (dispatch,) = dispatches
        waiting = list(dispatch._arrivals)
        reads.set()
        await asking
    assert sum(isinstance(each.output, pb.Output) for each in waiting) <= 4
    told = [json.loads(line[6:]) for line in b"".join(events).split(b"\n\n") if line.startswith(b"data: {")]
    logprobs = [choice["logprobs"] for event in told for choice in event["choices"]]
    tokens = [token for each in logprobs for token in each["tokens"]]
    assert len(tokens) == 200
    assert tokens == (tokens[: len(sentence)] * 200)[:200]
    assert all(len(top) == 3 for each in logprobs for top in each["top_logprobs"])
    assert told[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_prompt_is_there_once_however_many_answers_it_gets(make_worker, monkeypatch):
    place, asked, worker = Placer.place, [], make_worker()

    def watched(self, ask, *args, **options):
        asked.append(ask)
        return place(self, ask, *args, **options)

    monkeypatch.setattr(Placer, "place", watched)
    async with running_router(RouterConfig(), worker) as running, client(running) as http:
        body = {"prompt": [5] * 200, "max_tokens": 1, "n": 3}
        assert (await http.post(URL, json=body)).status_code == 200
    assert [list(request.prompt_token_ids) for request in worker.requests] == [[5] * 200] * 3
    assert len(asked) == 3
    assert len({id(ask.prompt) for ask in asked}) == 1
    assert all(ask.order.ByteSize() < 200 for ask in asked)


async def test_an_answer_that_is_not_read_holds_its_memory(make_worker):
    reads = asyncio.Event()

    async def send(message):
        await reads.wait()

    async with running_router(RouterConfig(), make_worker()) as running:
        body = {"prompt": [5] * 150, "max_tokens": 100, "echo": True, "logprobs": 20}
        asking = asyncio.create_task(taken_by(running, body, send))
        await until(lambda: running.parts.memory.num_bytes > SMALL_BYTES and not running.parts.admission.num_running)
        reads.set()
        await asking
        assert running.parts.memory.num_bytes == 0


@pytest.mark.parametrize("lengths", [[], [0, 3, 0], [10], [25], [4, 4, 4, 40, 1], [1] * 30])
async def test_an_answers_pieces_are_sent_in_parts_of_bounded_size(monkeypatch, lengths):
    monkeypatch.setattr(http_edge, "_PART_BYTES", 10)
    pieces, messages = [bytes([65 + at]) * length for at, length in enumerate(lengths)], []

    async def send(message):
        messages.append(message)

    await http_edge.send_pieces(send, pieces)
    start, *parts = messages
    assert b"".join(part["body"] for part in parts) == b"".join(pieces)
    assert (b"content-length", b"%d" % sum(lengths)) in start["headers"]
    assert max(len(part["body"]) for part in parts) <= 20
    assert [part["more_body"] for part in parts] == [True] * (len(parts) - 1) + [False]


@given(TEXTS | strategies.text("\0a"), strategies.lists(strategies.lists(strategies.integers(0, 99), max_size=3)))
def test_an_answer_in_pieces_is_the_same_as_in_one(text, lists):
    columns = [Column() for _ in lists]
    for column, values in zip(columns, lists, strict=True):
        for value in values:
            column.add(b"%d" % value)
    payload = {"text": text, "columns": columns, "more": {"of": [array("I", [1, 2]), text]}}
    written = b"".join(in_pieces(payload))
    assert written == orjson.dumps(payload, default)
    assert orjson.loads(written) == {"text": text, "columns": lists, "more": {"of": [[1, 2], text]}}


async def test_rendering_log_probabilities_freezes_nobody(make_worker, monkeypatch):
    """Others take a turn between any two slices of sixty-four positions."""
    turns, at = 0, []
    from services.router.openai import logprobs as module

    add = module.CompletionLogprobs.add

    def watched(self, *args):
        at.append(turns)
        return add(self, *args)

    monkeypatch.setattr(module.CompletionLogprobs, "add", watched)
    async with running_router(RouterConfig(), make_worker()) as running, client(running) as http:
        body = {"prompt": [5] * 250, "echo": True, "logprobs": 5, "max_tokens": 1}
        asking = asyncio.create_task(http.post(URL, json=body))
        while not asking.done():
            turns += 1
            await asyncio.sleep(0)
        assert len((await asking).json()["choices"][0]["logprobs"]["tokens"]) == 251
    assert len(at) == 251
    assert max(at.count(turn) for turn in set(at)) <= 64
