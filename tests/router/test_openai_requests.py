"""Bodies are read as documented, and whatever is wrong is a 400 that names the field."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.config import RouterConfig
from services.router.errors import ApiError
from services.router.openai.bodies import ChatBody, CompletionBody
from services.router.openai.decoding import decode
from services.router.openai.requests import check_chat, check_completion, check_messages, check_prompts
from services.router.text import ServedModel
from services.router.text.models import ModelSource, load_model_files

CONFIG = RouterConfig(max_logprobs=20)
USER = {"role": "user", "content": "hi"}


def served(directory, **defaults) -> ServedModel:
    files = load_model_files(ModelSource(str(directory), str(directory)), "", use_defaults=False)
    files.sampling_defaults.update(defaults)
    return ServedModel(
        "tiny", files, max_model_len=256, created_unix_s=0, root=str(directory), fingerprints=frozenset()
    )


@pytest.fixture(scope="module")
def model(model_directory):
    return served(model_directory)


def parse_completion(body, model):
    read = decode(json.dumps(body).encode(), CompletionBody)
    return check_completion(read, check_prompts(read.prompt, model.files.vocab_size), model, CONFIG)


def parse_chat(body, model):
    read = decode(json.dumps(body).encode(), ChatBody)
    check_messages(read)
    return check_chat(read, model, CONFIG)


def completion(model, **fields):
    return parse_completion({"prompt": "x", **fields}, model)


def chat(model, **fields):
    return parse_chat({"messages": [USER], **fields}, model)


def test_neutral_values_where_nothing_is_asked(model):
    request = completion(model)
    params = request.sampling
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert params.repetition_penalty == 1.0
    assert not params.HasField("logprobs")
    assert request.max_tokens is None
    assert (request.body.n, request.body.stream, request.body.echo) == (1, False, False)


def test_null_counts_as_absent(model):
    names = [
        "temperature",
        "top_p",
        "n",
        "max_tokens",
        "stop",
        "stream",
        "seed",
        "logit_bias",
        "user",
        "stream_options",
    ]
    assert completion(model, **dict.fromkeys(names)) == completion(model)


def test_a_whole_number_written_as_16_0_harms_no_other_field(model):
    params = completion(model, max_tokens=16.0, logit_bias={"5": -100})
    assert (params.max_tokens, dict(params.lists.logit_bias)) == (16, {5: -100})


def test_the_models_defaults_hold_where_the_client_says_nothing(model_directory):
    model = served(model_directory, temperature=0.25, top_k=5)
    assert completion(model).sampling.temperature == 0.25
    assert completion(model).sampling.top_k == 5
    assert completion(model, temperature=0).sampling.temperature == 0
    assert completion(model, top_k=-1).sampling.top_k == 0


def test_every_sampling_field_arrives(model):
    request = completion(
        model,
        temperature=0.5,
        top_p=0.75,
        top_k=7,
        min_p=0.125,
        presence_penalty=1.5,
        frequency_penalty=-1.5,
        repetition_penalty=1.25,
        logit_bias={"5": -100, "7": 2.5},
        allowed_token_ids=[5, 6],
        stop_token_ids=[9],
        ignore_eos=True,
        min_tokens=3,
        max_tokens=10,
        logprobs=4,
        seed=11,
    )
    params, lists = request.sampling_for(choice=2, max_tokens=10), request.lists
    assert dict(lists.logit_bias) == {5: -100, 7: 2.5}
    assert list(lists.allowed_token_ids) == [5, 6]
    assert list(lists.stop_token_ids) == [9]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.75, 7, 0.125)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1.5, -1.5, 1.25)
    assert (params.ignore_eos, params.min_tokens, params.max_tokens, params.logprobs, params.seed) == (
        True,
        3,
        10,
        4,
        13,
    )


def test_a_seed_is_drawn_where_none_is_given(model):
    request = completion(model)
    assert len({request.sampling_for(0, 1).seed for _ in range(8)}) == 8
    assert completion(model, seed=-1).sampling_for(0, 1).seed == 2**64 - 1


def test_echo_asks_for_the_prompts_logprobs(model):
    assert completion(model, echo=True, logprobs=2).sampling.prompt_logprobs == 2
    assert not completion(model, echo=True).sampling.HasField("prompt_logprobs")
    assert completion(model, prompt_logprobs=0).sampling.HasField("prompt_logprobs")


def test_chat_takes_both_names_of_max_tokens(model):
    assert chat(model, max_tokens=3).max_tokens == 3
    assert chat(model, max_tokens=3, max_completion_tokens=4).max_tokens == 4
    assert chat(model).max_tokens is None


def test_tool_call_arguments_become_objects(model):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    request = chat(model, messages=[USER, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert check_messages(request.body)[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert call["function"]["arguments"] == '{"a": 1}'


def test_unknown_fields_and_fields_that_steer_the_inside_are_ignored(model):
    inside = {
        "kv_transfer_params": {"x": 1},
        "prefill_targets": ["evil"],
        "timeout_s": 1,
        "handle": 3,
        "data_parallel_rank": 1,
    }
    assert completion(model, **inside, made_up=1) == completion(model)


BAD_COMMON = [
    ("temperature", -0.1), ("temperature", "hot"), ("temperature", True), ("temperature", []),
    ("top_p", 0), ("top_p", 1.01), ("top_k", -2), ("top_k", 1.5), ("top_k", 2**40), ("min_p", 2), ("min_p", -1),
    ("presence_penalty", 3), ("frequency_penalty", -2.5), ("repetition_penalty", 0), ("repetition_penalty", -1),
    ("n", 0), ("n", 129), ("n", True), ("n", "2"), ("max_tokens", -1), ("max_tokens", 1e30), ("max_tokens", "9"),
    ("min_tokens", -1), ("seed", 2**70), ("seed", 1.5), ("seed", "x"), ("priority", 2**40), ("priority", 1),
    ("stream", "yes"), ("user", 5),
    ("stop", 5), ("stop", [1]), ("stop", [None]), ("stop", ["x"] * 17), ("stop", ""), ("stop", "x" * 2000),
    ("stop_token_ids", [-1]), ("stop_token_ids", [10**9]), ("stop_token_ids", "5"), ("stop_token_ids", [True]),
    ("allowed_token_ids", []), ("allowed_token_ids", [1.5]),
    ("logit_bias", {"x": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"99999": 1}), ("logit_bias", [1]),
    ("logit_bias", {"1": True}), ("logit_bias", {"²": 1}), ("logit_bias", {"-1": 1}),
    ("stream_options", {"include_usage": True}), ("stream_options", []), ("ignore_eos", 1),
    ("cache_salt", ""), ("cache_salt", 5), ("cache_salt", "x" * 1025), ("prompt_logprobs", -1), ("prompt_logprobs", 21),
    ("use_beam_search", True), ("structured_outputs", {"json": {}}), ("guided_choice", ["a"]), ("bad_words", ["x"]),
    ("guided_json", {"type": "object"}), ("guided_regex", "a+"), ("guided_grammar", "root ::= x"),
    ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("response_format", {"type": "json_object"}), ("response_format", {"type": "x"}), ("response_format", "x"),
    ("chat_template", "{{ 1 }}"), ("skip_special_tokens", "no"), ("best_of", 2), ("best_of", -1),
]  # fmt: skip


@pytest.mark.parametrize("parse", [completion, chat])
@pytest.mark.parametrize(("name", "value"), BAD_COMMON)
def test_a_bad_field_is_named(model, parse, name, value):
    with pytest.raises(ApiError) as caught:
        parse(model, **{name: value})
    assert caught.value.status == 400
    assert caught.value.param == name
    assert f"`{name}`" in caught.value.message


@pytest.mark.parametrize(
    "prompt",
    [None, 5, {}, [], [[]][:0], [None], [True], [1.0], [-1], [10**6], ["a", 1], ["a", [1]], [[1], "a"], [[1], [None]]],
)
def test_a_bad_prompt_is_named(model, prompt):
    with pytest.raises(ApiError) as caught:
        completion(model, prompt=prompt)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_max_tokens_zero_is_for_echo_only(model):
    assert completion(model, max_tokens=0, echo=True).max_tokens == 0
    with pytest.raises(ApiError, match="max_tokens"):
        completion(model, max_tokens=0)


@pytest.mark.parametrize(
    "messages",
    [
        None, [], {}, "hi", [5], [{}], [{"role": "user"}], [{"role": 1, "content": "x"}],
        [{"role": "", "content": "x"}],
        [{"role": "user", "content": 5}], [{"role": "user", "content": [5]}], [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"text": "x"}]}],
        [{"role": "assistant", "tool_calls": 5, "content": "x"}],
        [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}],
    ],
)  # fmt: skip
def test_bad_messages_are_refused(model, messages):
    with pytest.raises(ApiError) as caught:
        chat(model, messages=messages)
    assert caught.value.status == 400
    assert caught.value.param.startswith("messages")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tool_choice", "required"), ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("top_logprobs", 3), ("top_logprobs", -1), ("logprobs", 5), ("tools", [5]), ("tools", {}), ("functions", [{}]),
        ("modalities", ["audio"]), ("audio", {"voice": "x"}), ("chat_template_kwargs", []), ("documents", ["x"]),
    ],
)  # fmt: skip
def test_a_bad_chat_field_is_named(model, name, value):
    with pytest.raises(ApiError) as caught:
        chat(model, **{name: value})
    assert (caught.value.status, caught.value.param) == (400, name)


def test_tools_without_a_constraint_go_to_the_template(model):
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(model, tools=tools, tool_choice="auto").body.tools == tools


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["text", "auto", "user", "-1", "1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted({name for name, _ in BAD_COMMON} | {"prompt", "messages", "echo", "logprobs", "tools"}))


@settings(max_examples=100, deadline=None)
@given(body=st.dictionaries(NAMES, JSON, max_size=6))
@pytest.mark.parametrize("parse", [parse_completion, parse_chat])
def test_garbage_is_read_or_refused_and_never_crashes(model, parse, body):
    def read() -> int:
        try:
            request = parse(body, model)
        except ApiError as error:
            return error.status if json.loads(error.body())["error"]["message"] else 0
        return 200 if request.sampling_for(0, 1).SerializeToString() else 0

    assert read() in (200, 400)


def test_whole_numbers_may_be_written_with_a_point(model):
    assert completion(model, max_tokens=16.0, n=2.0, top_k=1e1).max_tokens == 16


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("n", 0, "`n`: expected `int` >= 1, got 0."),
        ("n", "2", "`n`: expected `int`, got `str`."),
        ("temperature", -0.5, "`temperature`: expected `float` >= 0.0, got -0.5."),
        ("stop_token_ids", [5, 1.5], "`stop_token_ids` is wrong at `stop_token_ids[1]`: expected `int`, got `float`."),
        ("logit_bias", {"x": 1}, "`logit_bias` has a key that is wrong: expected `int`, got `str`."),
        ("suffix", "x", "`suffix` is not supported: this server cannot insert into a text"),
    ],
)
def test_a_refusal_says_what_was_expected_and_what_came(model, name, value, words):
    with pytest.raises(ApiError) as caught:
        completion(model, **{name: value})
    assert caught.value.message == words


def test_empty_stream_options_are_none(model):
    assert not completion(model, stream_options={}).body.stream_options.include_usage
    assert completion(model, stream=True, stream_options={"include_usage": True}).body.stream_options.include_usage


def test_what_is_missing_is_named(model):
    with pytest.raises(ApiError) as caught:
        parse_completion({}, model)
    assert (caught.value.param, caught.value.message) == ("prompt", "`prompt` is required.")
