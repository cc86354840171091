"""Checks decoded bodies against model and settings. An error is an ApiError 400 that names the field."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from tandem.v1 import worker_pb2 as pb

from services.router.config import RouterConfig
from services.router.errors import invalid, not_supported
from services.router.openai.bodies import (
    MAX_STOP_LENGTH,
    ChatBody,
    CompletionBody,
    GenerateBody,
    StreamOptions,
    TokenizeBody,
)
from services.router.text import ServedModel

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class GenerationRequest:
    """A checked body, and what came of it."""

    body: GenerateBody
    sampling: pb.SamplingParams
    """All but the lists, and but seed and max_tokens, which differ per sequence."""
    lists: pb.SamplingParams
    """logit_bias, allowed_token_ids and stop_token_ids alone."""
    max_tokens: int | None
    max_tokens_field: str
    """Where the client wrote it."""
    stops: tuple[str, ...]
    stop_token_ids: frozenset[int]
    """The client's own."""

    def sampling_for(self, choice: int, max_tokens: int) -> pb.SamplingParams:
        """The parameters of the choice-th answer to one prompt, without the lists."""
        params, seed = pb.SamplingParams(), self.body.seed
        params.CopyFrom(self.sampling)
        params.seed = secrets.randbits(63) if seed is None else (seed + choice) % 2**64
        params.max_tokens = max_tokens
        params.min_tokens = min(params.min_tokens, max_tokens)
        return params


def check_completion(
    body: CompletionBody, prompts: Sequence[object], model: ServedModel, config: RouterConfig
) -> GenerationRequest:
    """Raises ApiError."""
    if body.max_tokens == 0 and not body.echo:
        raise invalid("`max_tokens` must be at least 1, or 0 with `echo`.", "max_tokens")
    _check_logprobs("logprobs", body.logprobs, config)
    prompt_logprobs = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    return _check_common(body, model, config, len(prompts), "max_tokens", body.logprobs, prompt_logprobs)


def check_chat(body: ChatBody, model: ServedModel, config: RouterConfig) -> GenerationRequest:
    """All but the messages. Raises ApiError."""
    if body.tool_choice not in (None, "none", "auto"):
        raise not_supported("tool_choice", "only `none` and `auto` are; no tool call can be enforced")
    if body.modalities not in (None, ["text"]):
        raise not_supported("modalities", "this server makes text only")
    _check_logprobs("top_logprobs", body.top_logprobs, config)
    if body.top_logprobs and not body.logprobs:
        raise invalid("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _check_common(body, model, config, 1, field, logprobs, body.prompt_logprobs)


def check_messages(body: ChatBody | TokenizeBody) -> list[dict[str, Any]]:
    """The messages as templates want them. Raises ApiError."""
    if body.continue_final_message and body.add_generation_prompt:
        raise invalid(
            "`continue_final_message` and `add_generation_prompt` cannot both be true.", "continue_final_message"
        )
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(body.messages or ())]


def check_prompts(prompt: str | list[str | int | list[int]], vocab_size: int) -> tuple[str | array[int], ...]:
    """A text, texts, token ids, or lists of token ids: always as a sequence of prompts. Raises ApiError."""

    def packed(token_ids: list[int]) -> array[int]:
        return array("I", check_token_ids(token_ids, "prompt", vocab_size))  # a tenth of the list's memory

    if isinstance(prompt, str):
        return (prompt,)
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return (packed(prompt),)  # type: ignore[arg-type]
    if kinds == {list}:
        return tuple(packed(ids) for ids in prompt)  # type: ignore[arg-type]
    if kinds != {str}:
        raise invalid("`prompt` must hold strings, token ids, or lists of token ids, not several of these.", "prompt")
    return tuple(prompt)  # type: ignore[arg-type]


def check_token_ids(token_ids: list[int], name: str, vocab_size: int) -> list[int]:
    """The ids, each of them in the vocabulary."""
    # Whole-list checks: this runs for every prompt that comes as ids.
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise invalid(f"`{name}`: token id {wrong} is out of vocabulary, which has {vocab_size} tokens.", name)
    return token_ids


# ---- the parts --------------------------------------------------------------


def _check_common(
    body: GenerateBody,
    model: ServedModel,
    config: RouterConfig,
    num_prompts: int,
    max_tokens_field: str,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> GenerationRequest:
    _check_combinations(body, num_prompts, config)
    max_tokens: int | None = getattr(body, max_tokens_field)
    if max_tokens is not None and body.min_tokens > max_tokens:
        raise invalid(f"`min_tokens` must not exceed the {max_tokens} tokens asked for.", "min_tokens")
    sampling = _sampling(body, model)
    if logprobs is not None:
        sampling.logprobs = logprobs
    if prompt_logprobs is not None:
        sampling.prompt_logprobs = prompt_logprobs
    stop_token_ids = frozenset(body.stop_token_ids or ())
    lists = _lists(body, model)
    return GenerationRequest(body, sampling, lists, max_tokens, max_tokens_field, _stops(body.stop), stop_token_ids)


def _check_combinations(body: GenerateBody, num_prompts: int, config: RouterConfig) -> None:
    body.refuse()
    n = body.n
    if body.response_format and body.response_format.get("type") != "text":
        raise not_supported("response_format", "only the type `text` is; there is no constrained decoding")
    if body.stream_options != StreamOptions() and not body.stream:
        raise invalid("`stream_options` is only allowed when `stream` is true.", "stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("`prompt_logprobs` are not available when `stream` is true.", "prompt_logprobs")
    if body.best_of is not None and body.best_of > 1 and body.best_of != n:
        raise not_supported("best_of", "only as many answers are made as `n` asks for")
    if num_prompts * n > config.max_sequences_per_request:
        raise invalid(
            f"{num_prompts} prompts with `n`={n} make {num_prompts * n} sequences;"
            f" a request may have {config.max_sequences_per_request} at most.",
            "n" if n > 1 else "prompt",
        )
    if body.priority and config.scheduling_policy != "priority":
        raise not_supported("priority", "this server serves first come, first served (see --scheduling-policy)")
    if body.seed is not None and body.seed >= 2**64:
        raise invalid(f"`seed` must be less than 2**64, got {body.seed}.", "seed")
    _check_logprobs("prompt_logprobs", body.prompt_logprobs, config)


def _sampling(body: GenerateBody, model: ServedModel) -> pb.SamplingParams:
    defaults = model.files.sampling_defaults

    def chosen(name: str, neutral: float) -> float:
        value: float | None = getattr(body, name)
        return value if value is not None else defaults.get(name, neutral)

    return pb.SamplingParams(
        temperature=chosen("temperature", 1.0),
        top_p=chosen("top_p", 1.0),
        top_k=max(int(chosen("top_k", 0)), 0),
        min_p=chosen("min_p", 0.0),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=chosen("repetition_penalty", 1.0),
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
    )


def _lists(body: GenerateBody, model: ServedModel) -> pb.SamplingParams:
    vocab_size, eos_token_id = model.files.vocab_size, model.tokenizer.eos_token_id
    # Workers read the model's configuration only; the tokenizer's may name another end, as base models' often do.
    own_ends = [] if eos_token_id is None or body.ignore_eos else [eos_token_id]
    return pb.SamplingParams(
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
        allowed_token_ids=_distinct(check_token_ids(body.allowed_token_ids or [], "allowed_token_ids", vocab_size)),
        stop_token_ids=_distinct(
            [*check_token_ids(body.stop_token_ids or [], "stop_token_ids", vocab_size), *own_ends]
        ),
    )


def _distinct(token_ids: Iterable[int]) -> list[int]:
    """Each id once, in order, so that there are no more of them than the vocabulary has."""
    return list(dict.fromkeys(token_ids))


def _logit_bias(biases: dict[int, float], vocab_size: int) -> dict[int, float]:
    check_token_ids(list(biases), "logit_bias", vocab_size)
    return biases


def _check_logprobs(name: str, wanted: int | None, config: RouterConfig) -> None:
    if wanted is not None and wanted > config.max_logprobs:
        raise invalid(f"`{name}` must be between 0 and {config.max_logprobs}, got {wanted}.", name)


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else stop
    if not all(0 < len(each) <= MAX_STOP_LENGTH for each in stops):
        raise invalid(f"A `stop` string must have 1 to {MAX_STOP_LENGTH} characters.", "stop")
    return tuple(dict.fromkeys(stops))


def _check_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    if message.get("tool_calls") is not None:
        message = {**message, "tool_calls": _check_tool_calls(message["tool_calls"], f"{where}.tool_calls")}
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
    parts = [_check_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    return {**message, "content": parts}


def _check_tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
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


def _check_part(part: object, where: str) -> dict[str, str]:
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
