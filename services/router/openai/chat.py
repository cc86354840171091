"""Serves /v1/chat/completions: turns messages into token ids, and deltas into chat.completion objects."""

from __future__ import annotations

import contextlib
from array import array
from typing import Any

from services.router import sse
from services.router.config import RouterConfig
from services.router.errors import invalid
from services.router.openai.bodies import ChatBody, TokenizeBody
from services.router.openai.choice import Delta
from services.router.openai.columns import Column, default
from services.router.openai.generation import Generation, GenerationPlan, prompt_too_long, tokens_to_generate
from services.router.openai.logprobs import TokenNamer, chat_position, prompt_position
from services.router.openai.renderer import Renderer, in_turns
from services.router.openai.requests import check_chat, check_messages
from services.router.text import (
    SHORT_CHARS,
    ChatTemplateError,
    ClientPool,
    GoOn,
    PromptTooLong,
    ServedModel,
    TemplateBudgetSpent,
    at_once,
)

_FEW_MESSAGES = 32
_SHORT_TEXT_CHARS = 4 * SHORT_CHARS
"""A short conversation's, with what its template adds."""


async def plan_chat(
    body: ChatBody, model: ServedModel, config: RouterConfig, request_id: str, pool: ClientPool
) -> GenerationPlan:
    """Checks the body, renders and tokenizes the conversation. Raises ApiError."""
    request = await pool.look_at(lambda: check_chat(body, model, config), body.num_ids())
    prompt = await tokenize_chat(body, model, pool, model.max_model_len)
    default = model.files.sampling_defaults.get("max_tokens")
    max_tokens = tokens_to_generate(
        request, len(prompt), "messages", int(default) if default else None, model.max_model_len
    )
    return GenerationPlan(model, request, request_id, [prompt], [max_tokens])


async def tokenize_chat(
    body: ChatBody | TokenizeBody, model: ServedModel, pool: ClientPool, max_tokens: int
) -> array[int]:
    """Token ids of the rendered conversation. Raises ApiError, also where the template refuses it."""
    if len(body.messages or ()) > max_tokens:  # each has a token at least
        raise prompt_too_long(max_tokens, len(body.messages or ()), "messages")
    adds_prompt = body.add_generation_prompt
    template = model.chat_template(bool(body.tools))

    def render(is_short: bool) -> str:
        return template.render(
            check_messages(body),  # here, since there may be a million of them
            tools=body.tools,
            documents=body.documents,
            add_generation_prompt=not body.continue_final_message if adds_prompt is None else adds_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
            is_short=is_short,
        )

    def run(go_on: GoOn, rendered: str | None = None) -> array[int]:
        go_on()
        text = rendered if rendered is not None else render(is_short=False)
        return model.tokenizer.encode_bounded(text, bool(body.add_special_tokens), max_tokens, go_on)

    try:
        if _is_short(body):
            with contextlib.suppress(TemplateBudgetSpent):
                text = render(is_short=True)
                if len(text) <= _SHORT_TEXT_CHARS:
                    return at_once(lambda go_on: run(go_on, text))
        return await pool.run(run, sum(map(_num_chars, body.messages or ())))
    except ChatTemplateError as error:
        raise invalid(str(error), "messages") from error
    except PromptTooLong as error:
        raise prompt_too_long(max_tokens, error.at_least, "messages") from error


def _is_short(body: ChatBody | TokenizeBody) -> bool:
    """Whether a template has little to do: a few messages of little text, and nothing else to loop over."""
    messages = body.messages or ()
    if len(messages) > _FEW_MESSAGES or body.tools or body.documents or body.chat_template_kwargs:
        return False
    values = [value for message in messages for value in message.values()]
    return all(isinstance(value, str) for value in values) and sum(map(len, values)) <= SHORT_CHARS


def _num_chars(message: dict[str, Any]) -> int:
    """Roughly; a message is work by itself."""
    content = message.get("content")
    return 64 * len(message) + (len(content) if isinstance(content, str) else 0)


class ChatRenderer(Renderer):
    """Writes one chat completion's answer."""

    id_prefix, answer, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, generation: Generation, created_unix_s: int) -> None:
        super().__init__(generation, created_unix_s)
        self._namer = TokenNamer(self._plan.model.tokenizer, self._body.return_tokens_as_token_ids)

    async def show_logprobs(self, delta: Delta) -> None:
        if self._request.sampling.HasField("prompt_logprobs"):
            tokenizer, of_prompt, shown = self._plan.model.tokenizer, delta.prompt_logprobs, delta.shown_prompt_logprobs
            await in_turns(lambda i: shown.add(prompt_position(tokenizer, of_prompt[i])), len(of_prompt))
        if self._wants_logprobs:
            namer, pairs = self._namer, list(zip(delta.token_ids, delta.logprobs, strict=True))
            num_top, content = self._request.sampling.logprobs, Column()
            delta.shown_logprobs = {"content": content}
            await in_turns(lambda i: content.add(chat_position(namer, *pairs[i], num_top)), len(pairs))
        delta.logprobs, delta.prompt_logprobs = [], []

    def opening(self) -> bytes:
        """The role chunk of each choice, with which every chat stream starts."""
        events = []
        for index in range(self._plan.num_sequences):
            choice = {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            payload = self._chunk(choice, index)
            if self._body.return_token_ids and index == 0:
                payload["prompt_token_ids"] = self._plan.prompts[0]
            events.append(sse.event(payload, default))
        return b"".join(events)

    def _news(self, delta: Delta) -> dict[str, object] | None:
        if not (delta.text or delta.token_ids or delta.finish_reason):
            return None
        choice: dict[str, object] = {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text or not delta.finish_reason else {},
            "logprobs": self._logprobs(delta) if delta.token_ids else None,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason:
            choice["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _whole(self, delta: Delta) -> dict[str, object]:
        choice: dict[str, object] = {
            "index": delta.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _more(self, first: Delta) -> dict[str, object]:
        more: dict[str, object] = {}
        if self._body.return_token_ids:
            more["prompt_token_ids"] = self._plan.prompts[0]
        if self._request.sampling.HasField("prompt_logprobs"):
            more["prompt_logprobs"] = first.shown_prompt_logprobs
        return more

    def _logprobs(self, delta: Delta) -> dict[str, object] | None:
        if not self._wants_logprobs:
            return None
        return {**delta.shown_logprobs, "refusal": None}
