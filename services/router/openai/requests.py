"""Bodies of /v1/completions and /v1/chat/completions, checked. Anything wrong is an ApiError 400 that names the field.

Fields that we do not know are ignored. Fields that would change the answer and that we cannot honour are refused: an
answer that silently ignores a constraint is a wrong answer. Fields that steer a disaggregated server's insides
(`kv_transfer_params` and the like) are never read, so no client can reach them.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from tandem.v1 import worker_pb2 as pb

from services.router.config import RouterConfig
from services.router.errors import invalid, not_supported
from services.router.openai import fields
from services.router.text import ServedModel

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_CACHE_SALT_LENGTH = 1024
DEFAULT_COMPLETION_TOKENS = 16

_REFUSED = {
    "suffix": "this server cannot insert into a text",
    "use_beam_search": "there is no beam search",
    "structured_outputs": "there is no constrained decoding",
    "guided_json": "there is no constrained decoding",
    "guided_regex": "there is no constrained decoding",
    "guided_choice": "there is no constrained decoding",
    "guided_grammar": "there is no constrained decoding",
    "structural_tag": "there is no constrained decoding",
    "bad_words": "use logit_bias",
    "logits_processors": "use logit_bias or allowed_token_ids",
    "logprob_token_ids": "use logprobs",
    "prompt_embeds": "send text or token ids",
    "truncate_prompt_tokens": "send a prompt that fits",
    "thinking_token_budget": "use max_tokens",
    "functions": "use tools; they are passed to the chat template",
    "audio": "this server makes text only",
    "chat_template": "the template is the server's; pass chat_template_kwargs",
}


@dataclass(frozen=True)
class GenerationRequest:
    """What both endpoints have in common."""

    sampling: pb.SamplingParams
    """All but seed and max_tokens, which differ per sequence."""
    max_tokens: int | None
    max_tokens_field: str
    """Where the client wrote it."""
    n: int
    seed: int | None
    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    return_tokens_as_token_ids: bool
    priority: int
    cache_salt: str
    receipt: bool

    def sampling_for(self, choice: int, max_tokens: int) -> pb.SamplingParams:
        """The parameters of the choice-th answer to one prompt."""
        params = pb.SamplingParams()
        params.CopyFrom(self.sampling)
        params.seed = secrets.randbits(63) if self.seed is None else (self.seed + choice) % 2**64
        params.max_tokens = max_tokens
        params.min_tokens = min(params.min_tokens, max_tokens)
        return params


@dataclass(frozen=True)
class CompletionRequest:
    """Body of /v1/completions. `prompts` holds texts or token ids."""

    common: GenerationRequest
    prompts: tuple[str | list[int], ...]
    echo: bool
    add_special_tokens: bool


@dataclass(frozen=True)
class ChatInput:
    """The conversation and how to render it; shared with /tokenize."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    documents: list[dict[str, Any]]
    template_variables: dict[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool
    add_special_tokens: bool


@dataclass(frozen=True)
class ChatRequest:
    """Body of /v1/chat/completions."""

    common: GenerationRequest
    chat: ChatInput


def parse_completion(body: dict[str, Any], model: ServedModel, config: RouterConfig) -> CompletionRequest:
    """Raises ApiError."""
    _refuse_unsupported(body)
    echo = fields.boolean(body, "echo")
    logprobs = fields.integer(body, "logprobs", 0, config.max_logprobs)
    prompt_logprobs = fields.integer(body, "prompt_logprobs", 0, config.max_logprobs)
    if prompt_logprobs is None and echo:
        prompt_logprobs = logprobs
    max_tokens = fields.integer(body, "max_tokens", 0 if echo else 1, fields.INT32_MAX)
    common = _parse_common(body, model, config, "max_tokens", max_tokens, logprobs, prompt_logprobs)
    prompts = parse_prompts(body, model.files.vocab_size)
    _check_num_sequences(len(prompts), common.n, config.max_sequences_per_request)
    return CompletionRequest(
        common=common,
        prompts=prompts,
        echo=echo,
        add_special_tokens=fields.boolean(body, "add_special_tokens", True),
    )


def parse_chat(body: dict[str, Any], model: ServedModel, config: RouterConfig) -> ChatRequest:
    """Raises ApiError."""
    _refuse_unsupported(body)
    _check_tool_choice(body)
    modalities = body.get("modalities")
    if modalities is not None and modalities != ["text"]:
        raise not_supported("modalities", "this server makes text only")
    wants_logprobs = fields.boolean(body, "logprobs")
    top_logprobs = fields.integer(body, "top_logprobs", 0, config.max_logprobs)
    if top_logprobs and not wants_logprobs:
        raise invalid("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
    max_tokens_field = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    common = _parse_common(
        body,
        model,
        config,
        max_tokens_field,
        fields.integer(body, max_tokens_field, 1, fields.INT32_MAX),
        (top_logprobs or 0) if wants_logprobs else None,
        fields.integer(body, "prompt_logprobs", 0, config.max_logprobs),
    )
    _check_num_sequences(1, common.n, config.max_sequences_per_request)
    return ChatRequest(common=common, chat=parse_chat_input(body))


def parse_chat_input(body: dict[str, Any]) -> ChatInput:
    """Messages and the fields that go with them. Raises ApiError."""
    continue_final_message = fields.boolean(body, "continue_final_message")
    add_generation_prompt = fields.boolean(body, "add_generation_prompt", not continue_final_message)
    if continue_final_message and add_generation_prompt:
        raise invalid(
            "`continue_final_message` and `add_generation_prompt` cannot both be true.", "continue_final_message"
        )
    return ChatInput(
        messages=_parse_messages(body),
        tools=fields.objects(body, "tools"),
        documents=fields.objects(body, "documents"),
        template_variables=fields.mapping(body, "chat_template_kwargs"),
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        add_special_tokens=fields.boolean(body, "add_special_tokens"),
    )


def parse_prompts(body: dict[str, Any], vocab_size: int) -> tuple[str | list[int], ...]:
    """A text, a list of texts, token ids, or a list of token ids: always as a sequence of prompts. Raises ApiError."""
    prompt = body.get("prompt")
    if prompt is None:
        raise invalid("`prompt` is required.", "prompt")
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list):
        raise invalid("`prompt` must be a string, a list of strings, token ids, or a list of token ids.", "prompt")
    if not prompt:
        raise invalid("`prompt` must not be empty.", "prompt")
    if not isinstance(prompt[0], str | list):
        return (fields.check_token_ids(prompt, "prompt", vocab_size),)
    prompts: list[str | list[int]] = []
    for member in prompt:
        if isinstance(member, str) and isinstance(prompt[0], str):
            prompts.append(member)
        elif isinstance(member, list) and isinstance(prompt[0], list):
            prompts.append(fields.check_token_ids(member, "prompt", vocab_size))
        else:
            raise invalid("`prompt` must hold either strings or lists of token ids, not both.", "prompt")
    return tuple(prompts)


# ---- the parts --------------------------------------------------------------


def _check_num_sequences(num_prompts: int, n: int, limit: int) -> None:
    if num_prompts * n > limit:
        raise invalid(
            f"{num_prompts} prompts with n={n} make {num_prompts * n} sequences; a request may have {limit} at most.",
            "n" if n > 1 else "prompt",
        )


def _parse_priority(body: dict[str, Any], config: RouterConfig) -> int:
    priority = fields.integer(body, "priority", -(2**31), fields.INT32_MAX) or 0
    if priority and config.scheduling_policy != "priority":
        raise not_supported("priority", "this server serves first come, first served (see --scheduling-policy)")
    return priority


def _parse_common(
    body: dict[str, Any],
    model: ServedModel,
    config: RouterConfig,
    max_tokens_field: str,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> GenerationRequest:
    stream = fields.boolean(body, "stream")
    options = fields.mapping(body, "stream_options")
    if options and not stream:
        raise invalid("`stream_options` is only allowed when `stream` is true.", "stream_options")
    if stream and body.get("prompt_logprobs") is not None:
        raise invalid("`prompt_logprobs` are not available when `stream` is true.", "prompt_logprobs")
    n = fields.integer(body, "n", 1, MAX_CHOICES) or 1
    best_of = fields.integer(body, "best_of", 0, MAX_CHOICES)
    if best_of is not None and best_of > 1 and best_of != n:
        raise not_supported("best_of", "only as many answers are made as `n` asks for")
    sampling = _parse_sampling(body, model)
    if max_tokens is not None and sampling.min_tokens > max_tokens:
        raise invalid(f"`min_tokens` must not exceed the {max_tokens} tokens asked for.", "min_tokens")
    if logprobs is not None:
        sampling.logprobs = logprobs
    if prompt_logprobs is not None:
        sampling.prompt_logprobs = prompt_logprobs
    fields.string(body, "user")
    cache_salt = fields.string(body, "cache_salt", MAX_CACHE_SALT_LENGTH)
    if cache_salt == "":
        raise invalid("`cache_salt` must not be empty.", "cache_salt")
    return GenerationRequest(
        sampling=sampling,
        max_tokens=max_tokens,
        max_tokens_field=max_tokens_field,
        n=n,
        seed=fields.integer(body, "seed", fields.INT64_MIN, 2**64 - 1),
        stops=_parse_stops(body),
        include_stop=fields.boolean(body, "include_stop_str_in_output"),
        skip_special_tokens=fields.boolean(body, "skip_special_tokens", True),
        stream=stream,
        include_usage=fields.boolean(options, "include_usage"),
        continuous_usage=fields.boolean(options, "continuous_usage_stats"),
        return_token_ids=fields.boolean(body, "return_token_ids"),
        return_tokens_as_token_ids=fields.boolean(body, "return_tokens_as_token_ids"),
        priority=_parse_priority(body, config),
        cache_salt=cache_salt or "",
        receipt=fields.boolean(body, "receipt"),
    )


def _parse_sampling(body: dict[str, Any], model: ServedModel) -> pb.SamplingParams:
    defaults, vocab_size = model.files.sampling_defaults, model.files.vocab_size

    def chosen(value: float | None, name: str, neutral: float) -> float:
        return value if value is not None else defaults.get(name, neutral)

    top_k = fields.integer(body, "top_k", -1, fields.INT32_MAX)
    return pb.SamplingParams(
        temperature=chosen(fields.number(body, "temperature", 0, 1e6), "temperature", 1.0),
        top_p=chosen(fields.number(body, "top_p", 0, 1, exclude_low=True), "top_p", 1.0),
        top_k=max(int(chosen(top_k, "top_k", 0)), 0),
        min_p=chosen(fields.number(body, "min_p", 0, 1), "min_p", 0.0),
        presence_penalty=fields.number(body, "presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number(body, "frequency_penalty", -2, 2) or 0.0,
        repetition_penalty=chosen(
            fields.number(body, "repetition_penalty", 0, 1e6, exclude_low=True), "repetition_penalty", 1.0
        ),
        logit_bias=_parse_logit_bias(body, vocab_size),
        allowed_token_ids=_parse_allowed_token_ids(body, vocab_size),
        min_tokens=fields.integer(body, "min_tokens", 0, fields.INT32_MAX) or 0,
        stop_token_ids=fields.token_ids(body, "stop_token_ids", vocab_size),
        ignore_eos=fields.boolean(body, "ignore_eos"),
    )


def _parse_allowed_token_ids(body: dict[str, Any], vocab_size: int) -> Sequence[int]:
    allowed = fields.token_ids(body, "allowed_token_ids", vocab_size)
    if body.get("allowed_token_ids") is not None and not allowed:
        raise invalid("`allowed_token_ids` must not be empty.", "allowed_token_ids")
    return allowed


def _parse_logit_bias(body: dict[str, Any], vocab_size: int) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, value in fields.mapping(body, "logit_bias").items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise invalid(f"`logit_bias` has the key {key[:40]!r}, which is not a token id.", "logit_bias")
        (token_id,) = fields.check_token_ids([int(key)], "logit_bias", vocab_size)
        biases[token_id] = fields.check_number(value, "logit_bias", -100, 100)
    return biases


def _parse_stops(body: dict[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("`stop` must be a string or a list of strings.", "stop")
    if len(stops) > MAX_STOPS:
        raise invalid(f"`stop` may hold {MAX_STOPS} strings at most, got {len(stops)}.", "stop")
    if any(not stop for stop in stops):
        raise invalid("`stop` must not hold an empty string.", "stop")
    if any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise invalid(f"A `stop` string may have {MAX_STOP_LENGTH} characters at most.", "stop")
    return tuple(dict.fromkeys(stops))


def _refuse_unsupported(body: dict[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if body.get(name):
            raise not_supported(name, why)
    response_format = fields.mapping(body, "response_format")
    if response_format and response_format.get("type") != "text":
        raise not_supported("response_format", "only the type `text` is; there is no constrained decoding")


def _check_tool_choice(body: dict[str, Any]) -> None:
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise not_supported("tool_choice", "only `none` and `auto` are; no tool call can be enforced")


def _parse_messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = fields.objects(body, "messages")
    if not messages:
        raise invalid("`messages` is required and must not be empty.", "messages")
    return [_parse_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _parse_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    if message.get("tool_calls") is not None:
        message = {**message, "tool_calls": _parse_tool_calls(message["tool_calls"], f"{where}.tool_calls")}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise invalid(f"`{where}.role` must be a string.", f"{where}.role")
    if content is None:
        if role == "assistant" and message.get("tool_calls"):
            return message
        raise invalid(f"`{where}.content` is required.", f"{where}.content")
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise invalid(f"`{where}.content` must be a string or a list of text parts.", f"{where}.content")
    parts = [_parse_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    return {**message, "content": parts}


def _parse_tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Earlier calls, for the template. Clients send the arguments as JSON text, templates want the object."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise invalid(f"`{where}` must be a list of objects.", where)
    parsed = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = orjson.loads(function["arguments"] or "{}")
            except orjson.JSONDecodeError as error:
                raise invalid(f"`{where}`: the arguments of a call are not JSON: {error}", where) from error
            call = {**call, "function": {**function, "arguments": arguments}}
        parsed.append(call)
    return parsed


def _parse_part(part: object, where: str) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise invalid(f"`{where}` must be a text part.", where)
    kind = part.get("type")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise invalid(
            f"`{where}` has the type {str(kind)[:40]!r}: this server takes text parts only.",
            where,
            "unsupported_content",
        )
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise invalid(f"`{where}.text` must be a string.", f"{where}.text")
    return {"type": "text", "text": text}
