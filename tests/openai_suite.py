"""What an OpenAI client may expect of a server, as plain functions of the unmodified `openai` SDK.

They run against the router with a fake worker (tests/router) and against the whole stack. `Capabilities` says what the
model behind the server is known to do; where it knows nothing, only the protocol is checked. Every function is named
as the behaviour that it checks, and `SUITE` lists them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import openai
import pytest


@dataclass(frozen=True)
class Capabilities:
    """What the suite may rely on."""

    max_model_len: int
    prompt: str = "Hello world! How are"
    """A prompt that the model continues with at least 32 tokens when it must (ignore_eos)."""
    has_chat: bool = True
    vocab_size: int | None = None


LONG = {"ignore_eos": True}
GREEDY = {"temperature": 0.0, "extra_body": LONG}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello world!"}]


def lists_and_retrieves_models(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    listed = client.models.list().data
    assert model in [entry.id for entry in listed]
    entry = client.models.retrieve(model)
    assert (entry.id, entry.object) == (model, "model")
    assert entry.max_model_len == can.max_model_len  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no/such/model")
    assert caught.value.code == "model_not_found"


def completes_a_prompt(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    answer = client.completions.create(model=model, prompt=can.prompt, max_tokens=8, **GREEDY)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == model
    (choice,) = answer.choices
    assert choice.index == 0
    assert choice.finish_reason == "length"
    assert choice.text
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def defaults_to_sixteen_tokens(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    answer = client.completions.create(model=model, prompt=can.prompt, extra_body=LONG)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def streams_the_same_text(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    whole = client.completions.create(model=model, prompt=can.prompt, max_tokens=20, **GREEDY)
    chunks = list(client.completions.create(model=model, prompt=can.prompt, max_tokens=20, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 2


def streams_usage_when_asked(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    options = {"include_usage": True}
    stream = client.completions.create(
        model=model, prompt=can.prompt, max_tokens=5, stream=True, stream_options=options, **GREEDY
    )
    *chunks, last = list(stream)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 5
    assert last.usage.prompt_tokens_details is not None
    assert all(chunk.usage is None for chunk in chunks)


def streams_usage_with_every_chunk_when_asked(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(
        model=model,
        prompt=can.prompt,
        max_tokens=20,  # some of which may share a chunk
        stream=True,
        stream_options=options,
        **GREEDY,  # type: ignore[arg-type]
    )
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage is not None]
    assert counts == sorted(counts)
    assert counts[-1] == 20
    assert len(counts) > 2


def takes_prompts_in_every_form(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    tokens = client.post("/../tokenize", body={"model": model, "prompt": can.prompt}, cast_to=object)["tokens"]  # type: ignore[index]
    texts = []
    for prompt in (can.prompt, [can.prompt], tokens, [tokens]):
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=4, **GREEDY)
        texts.append(answer.choices[0].text)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(tokens)
    assert len(set(texts)) == 1
    batch = client.completions.create(model=model, prompt=[can.prompt, can.prompt], max_tokens=4, **GREEDY)
    assert [choice.index for choice in batch.choices] == [0, 1]
    assert {choice.text for choice in batch.choices} == set(texts)
    assert batch.usage is not None
    assert batch.usage.prompt_tokens == 2 * len(tokens)
    assert batch.usage.completion_tokens == 8


def gives_n_choices_in_order(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    answer = client.completions.create(
        model=model, prompt=[can.prompt, can.prompt], n=3, max_tokens=3, seed=5, temperature=0.8, extra_body=LONG
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    again = client.completions.create(
        model=model, prompt=[can.prompt, can.prompt], n=3, max_tokens=3, seed=5, temperature=0.8, extra_body=LONG
    )
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 18
    stream = client.completions.create(
        model=model, prompt=can.prompt, n=3, max_tokens=3, seed=5, temperature=0.8, stream=True, extra_body=LONG
    )
    texts = {0: "", 1: "", 2: ""}
    finished = []
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        if choice.finish_reason:
            finished.append(choice.index)
    assert sorted(finished) == [0, 1, 2]
    assert [texts[i] for i in range(3)] == [choice.text for choice in answer.choices[:3]]


def gives_completion_logprobs(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    answer = client.completions.create(model=model, prompt=can.prompt, max_tokens=6, logprobs=3, **GREEDY)
    choice = answer.choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert 1 <= len(top) <= 4
        assert top[token] == logprob
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    chunks = list(
        client.completions.create(model=model, prompt=can.prompt, max_tokens=6, logprobs=3, stream=True, **GREEDY)
    )
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens or ()] == logprobs.tokens
    assert [offset for part in parts for offset in part.text_offset or ()] == logprobs.text_offset


def echoes_the_prompt_with_its_logprobs(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    answer = client.completions.create(model=model, prompt=can.prompt, max_tokens=2, echo=True, logprobs=1, **GREEDY)
    choice = answer.choices[0]
    assert choice.text.startswith(can.prompt)
    assert answer.usage is not None
    num_tokens = answer.usage.prompt_tokens + 2
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == num_tokens
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None for value in logprobs.token_logprobs[1:])


def scores_a_prompt_without_generating(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    answer = client.completions.create(model=model, prompt=can.prompt, max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text == can.prompt
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens


def stops_at_a_string(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    whole = client.completions.create(model=model, prompt=can.prompt, max_tokens=24, **GREEDY).choices[0].text
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    expected = whole[: whole.index(stop)]
    answer = client.completions.create(model=model, prompt=can.prompt, max_tokens=24, stop=[stop], **GREEDY)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop  # type: ignore[attr-defined]
    stream = client.completions.create(model=model, prompt=can.prompt, max_tokens=24, stop=stop, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected
    shown = client.completions.create(
        model=model,
        prompt=can.prompt,
        max_tokens=24,
        temperature=0,
        stop=stop,
        extra_body={**LONG, "include_stop_str_in_output": True},
    )
    assert shown.choices[0].text == expected + stop


def returns_token_ids_when_asked(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    body = {**LONG, "return_token_ids": True}
    answer = client.completions.create(model=model, prompt=can.prompt, max_tokens=5, temperature=0, extra_body=body)
    choice = answer.choices[0]
    token_ids = choice.token_ids  # type: ignore[attr-defined]
    assert len(token_ids) == 5
    assert answer.usage is not None
    assert len(choice.prompt_token_ids) == answer.usage.prompt_tokens  # type: ignore[attr-defined]
    stream = client.completions.create(
        model=model, prompt=can.prompt, max_tokens=5, temperature=0, stream=True, extra_body=body
    )
    streamed = []
    prompts = []
    for chunk in stream:
        streamed += chunk.choices[0].token_ids  # type: ignore[attr-defined]
        prompts.append(chunk.choices[0].prompt_token_ids)  # type: ignore[attr-defined]
    assert streamed == token_ids
    assert prompts[0] == choice.prompt_token_ids  # type: ignore[attr-defined]
    assert not any(prompts[1:])


def chats(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, **GREEDY)  # type: ignore[arg-type]
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    parts = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello world!"}]},
    ]
    again = client.chat.completions.create(model=model, messages=parts, max_completion_tokens=8, **GREEDY)  # type: ignore[arg-type]
    assert again.choices[0].message.content == choice.message.content


def streams_a_chat(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    whole = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, **GREEDY)  # type: ignore[arg-type]
    stream = client.chat.completions.create(
        model=model,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    )
    chunks = list(stream)
    first, *middle, last = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in middle)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in middle if chunk.choices[0].finish_reason] == ["length"]
    assert all(chunk.choices[0].delta.role is None for chunk in middle)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12


def works_with_the_sdks_stream_helper(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    whole = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, **GREEDY)  # type: ignore[arg-type]
    content = whole.choices[0].message.content or ""
    stop = content[len(content) // 2 :][:3]  # the helper takes a stopped answer for whole, not one cut by length
    with client.chat.completions.stream(model=model, messages=MESSAGES, max_tokens=12, stop=stop, **GREEDY) as stream:  # type: ignore[arg-type]
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == content[: content.index(stop)]
    assert final.choices[0].message.content == text


def gives_chat_logprobs(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
        **GREEDY,
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 4
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert math.isclose(max(top.logprob for top in entry.top_logprobs), entry.logprob, abs_tol=1e-6)
        assert entry.bytes is not None
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
    text = b"".join(bytes(entry.bytes or ()) for entry in content).decode("utf-8", "replace")
    assert text == answer.choices[0].message.content


def refuses_bad_requests_by_name(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    bad = [
        ("temperature", {"temperature": -1}),
        ("top_p", {"top_p": 1.5}),
        ("max_tokens", {"max_tokens": -3}),
        ("n", {"n": 0}),
        ("logprobs", {"logprobs": 1000}),
        ("suffix", {"suffix": "x"}),
        ("best_of", {"best_of": 5}),
        ("stop", {"stop": [""]}),
    ]
    for name, fields in bad:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=model, prompt=can.prompt, **fields)  # type: ignore[call-overload]
        assert caught.value.param == name
        assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=model,
            messages=MESSAGES,  # type: ignore[arg-type]
            response_format={"type": "json_object"},
        )
    assert refused.value.param == "response_format"


def refuses_an_unknown_model(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="no-such-model", prompt="x")
    assert caught.value.code == "model_not_found"


def refuses_what_does_not_fit_the_context(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt=[1] * (can.max_model_len + 1), max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert f"maximum context length is {can.max_model_len} tokens" in caught.value.message
    with pytest.raises(openai.BadRequestError) as too_many:
        client.completions.create(model=model, prompt=can.prompt, max_tokens=can.max_model_len)
    assert too_many.value.code == "context_length_exceeded"
    if can.has_chat:
        with pytest.raises(openai.BadRequestError) as too_long:
            client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Hello! " * can.max_model_len}]
            )
        assert too_long.value.code == "context_length_exceeded"


def refuses_a_token_out_of_vocabulary(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt=[2**31], max_tokens=1)
    assert "out of vocabulary" in caught.value.message


def a_cut_stream_leaves_the_server_well(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    for _ in range(3):
        length = min(can.max_model_len - 64, 1000)
        stream = client.completions.create(
            model=model, prompt=can.prompt, max_tokens=length, stream=True, extra_body=LONG
        )
        next(iter(stream))
        stream.close()
    answer = client.completions.create(model=model, prompt=can.prompt, max_tokens=2, **GREEDY)
    assert answer.choices[0].text


def carries_request_ids(client: openai.OpenAI, model: str, can: Capabilities) -> None:
    raw = client.completions.with_raw_response.create(
        model=model, prompt=can.prompt, max_tokens=1, extra_headers={"X-Request-Id": "my-id-7"}
    )
    assert raw.headers["x-request-id"] == "my-id-7"
    assert raw.parse().id == "cmpl-my-id-7"
    answer = client.completions.create(model=model, prompt=can.prompt, max_tokens=1)
    assert answer._request_id


COMPLETION_SUITE: tuple[Callable[[openai.OpenAI, str, Capabilities], None], ...] = (
    lists_and_retrieves_models,
    completes_a_prompt,
    defaults_to_sixteen_tokens,
    streams_the_same_text,
    streams_usage_when_asked,
    streams_usage_with_every_chunk_when_asked,
    takes_prompts_in_every_form,
    gives_n_choices_in_order,
    gives_completion_logprobs,
    echoes_the_prompt_with_its_logprobs,
    scores_a_prompt_without_generating,
    stops_at_a_string,
    returns_token_ids_when_asked,
    refuses_bad_requests_by_name,
    refuses_an_unknown_model,
    refuses_what_does_not_fit_the_context,
    refuses_a_token_out_of_vocabulary,
    a_cut_stream_leaves_the_server_well,
    carries_request_ids,
)
CHAT_SUITE: tuple[Callable[[openai.OpenAI, str, Capabilities], None], ...] = (
    chats,
    streams_a_chat,
    works_with_the_sdks_stream_helper,
    gives_chat_logprobs,
)
SUITE = COMPLETION_SUITE + CHAT_SUITE
"""`CHAT_SUITE` needs a model with a chat template."""
