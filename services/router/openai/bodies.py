"""Declares the bodies of POST endpoints as types, for decoding and for /openapi.json.

A field that is null counts as absent, unknown ones are ignored. What depends on the model or on settings is checked by
`requests`. Fields that steer a disaggregated server's insides (`kv_transfer_params` and the like) are not
declared, so no client can reach them.
"""

from __future__ import annotations

from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta, Struct

from services.router.errors import not_supported

INT32_MAX = 2**31 - 1
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_ABORTS = 1024

_Count = Annotated[int, Meta(ge=0, le=INT32_MAX)]
_Positive = Annotated[int, Meta(ge=1, le=INT32_MAX)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_TokenId = Annotated[int, Meta(ge=0)]
_Objects = list[dict[str, Any]]
_TEXT = {"type": "string"}
_PARTS = [
    _TEXT,
    {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"enum": ["text", "input_text", "output_text"]}, "text": _TEXT},
    },
    {"type": "object", "required": ["type", "refusal"], "properties": {"type": {"const": "refusal"}, "refusal": _TEXT}},
]
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": _PARTS}}]}
_CALLS = {"type": "array", "items": {"type": "object"}, "minItems": 1}
_MESSAGE = {
    "anyOf": [
        {"required": ["role", "content"], "properties": {"role": {**_TEXT, "minLength": 1}, "content": _CONTENT}},
        {"required": ["role", "tool_calls"], "properties": {"role": {"const": "assistant"}, "tool_calls": _CALLS}},
    ]
}
_Messages = Annotated[
    list[Annotated[dict[str, Any], Meta(description="A message.", extra_json_schema=_MESSAGE)]], Meta(min_length=1)
]
_NoGrammar = Annotated[Any, Meta(description="there is no constrained decoding")]
_Prompt = Annotated[
    str | Annotated[list[str | int | list[int]], Meta(min_length=1)],
    Meta(description="A text, texts, token ids, or lists of token ids."),
]


class Refused(Struct, kw_only=True):
    """What would change the answer and cannot be honoured, and why: to ignore a constraint is to answer wrongly."""

    suffix: Annotated[Any, Meta(description="this server cannot insert into a text")] = None
    use_beam_search: Annotated[Any, Meta(description="there is no beam search")] = None
    structured_outputs: _NoGrammar = None
    guided_json: _NoGrammar = None
    guided_regex: _NoGrammar = None
    guided_choice: _NoGrammar = None
    guided_grammar: _NoGrammar = None
    structural_tag: _NoGrammar = None
    bad_words: Annotated[Any, Meta(description="use logit_bias")] = None
    logits_processors: Annotated[Any, Meta(description="use logit_bias or allowed_token_ids")] = None
    logprob_token_ids: Annotated[Any, Meta(description="use logprobs")] = None
    prompt_embeds: Annotated[Any, Meta(description="send text or token ids")] = None
    truncate_prompt_tokens: Annotated[Any, Meta(description="send a prompt that fits")] = None
    thinking_token_budget: Annotated[Any, Meta(description="use max_tokens")] = None
    functions: Annotated[Any, Meta(description="use tools; they are passed to the chat template")] = None
    audio: Annotated[Any, Meta(description="this server makes text only")] = None
    chat_template: Annotated[Any, Meta(description="the template is the server's; pass chat_template_kwargs")] = None

    def refuse(self) -> None:
        """Raises ApiError for the first of these that is given."""
        for name in Refused.__struct_fields__:
            if getattr(self, name):
                raise not_supported(
                    name, get_type_hints(Refused, include_extras=True)[name].__metadata__[0].description
                )


class StreamOptions(Struct):
    """What a stream tells beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerateBody(Refused, kw_only=True):
    """What /v1/completions and /v1/chat/completions have in common."""

    model: Annotated[str | None, Meta(description="May be left out where one model is served.")] = None
    request_id: Annotated[str | None, Meta(description="1 to 128 printable ASCII characters without space.")] = None
    user: str | None = None
    receipt: Annotated[bool | None, Meta(description="Adds what the answer cost, and where.")] = None
    stream: bool = False
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)

    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    best_of: Annotated[int, Meta(ge=0, le=MAX_CHOICES)] | None = None
    max_tokens: _Count | None = None
    min_tokens: _Count = 0
    temperature: Annotated[float, Meta(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=INT32_MAX)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    allowed_token_ids: Annotated[list[_TokenId], Meta(min_length=1)] | None = None
    stop_token_ids: list[_TokenId] | None = None
    ignore_eos: bool = False
    seed: Annotated[int, Meta(ge=-(2**63))] | None = None
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: _Count | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    priority: Annotated[int, Meta(ge=-(2**31), le=INT32_MAX)] = 0
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    response_format: Annotated[dict[str, Any] | None, Meta(description="Only the type `text`.")] = None

    def num_ids(self) -> int:
        """Token ids in its lists."""
        return sum(len(ids) for ids in (self.logit_bias, self.allowed_token_ids, self.stop_token_ids) if ids)

    def drop_input(self) -> None:
        """Give back the memory of what is not needed any more once the request is planned."""
        self.user = self.logit_bias = self.allowed_token_ids = self.stop_token_ids = self.response_format = None


class CompletionBody(GenerateBody, kw_only=True):
    """Body of /v1/completions."""

    prompt: _Prompt
    echo: bool = False
    logprobs: _Count | None = None
    add_special_tokens: bool = True

    def num_ids(self) -> int:
        if isinstance(self.prompt, str):
            return super().num_ids()
        lists = [ids for ids in self.prompt if isinstance(ids, list)]
        return super().num_ids() + (sum(map(len, lists)) if lists else len(self.prompt))

    def drop_input(self) -> None:
        super().drop_input()
        self.prompt = ""


class ChatBody(GenerateBody, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: _Messages
    tools: _Objects | None = None
    documents: _Objects | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    max_completion_tokens: _Positive | None = None
    max_tokens: _Positive | None = None
    logprobs: bool = False
    top_logprobs: _Count | None = None
    tool_choice: Annotated[Any, Meta(description="`none` or `auto`.")] = None
    modalities: Annotated[Any, Meta(description='Only ["text"].')] = None

    def drop_input(self) -> None:
        super().drop_input()
        self.messages, self.tools, self.documents, self.chat_template_kwargs = [], None, None, None


class TokenizeBody(Struct, kw_only=True):
    """Body of /tokenize: a prompt, or messages and what goes with them."""

    model: str | None = None
    prompt: str | None = None
    return_token_strs: bool = False
    messages: _Messages | None = None
    tools: _Objects | None = None
    documents: _Objects | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: Annotated[bool | None, Meta(description="Default: true for a prompt, false for messages.")] = (
        None
    )


class DetokenizeBody(Struct, kw_only=True):
    """Body of /detokenize."""

    tokens: list[_TokenId]
    model: str | None = None


class AbortBody(Struct, kw_only=True):
    """Body of /abort_requests."""

    request_ids: Annotated[list[str], Meta(min_length=1, max_length=MAX_ABORTS)]
