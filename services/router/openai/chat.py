"""Serves /v1/chat/completions: turns messages into token ids, and deltas into chat.completion objects."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from services.router import sse
from services.router.errors import invalid
from services.router.openai.choice import Delta
from services.router.openai.generation import Generation, GenerationPlan, Receipts, UsageCount, tokens_to_generate
from services.router.openai.logprobs import TokenNamer, chat_logprobs, prompt_logprobs
from services.router.openai.requests import ChatInput, ChatRequest
from services.router.text import ChatTemplateError, ServedModel, TokenizerPool


async def plan_chat(request: ChatRequest, model: ServedModel, request_id: str, pool: TokenizerPool) -> GenerationPlan:
    """Renders and tokenizes the conversation. Raises ApiError where it does not fit."""
    prompt = await tokenize_chat(request.chat, model, pool)
    default = model.files.sampling_defaults.get("max_tokens")
    max_tokens = tokens_to_generate(
        request.common, len(prompt), "messages", int(default) if default else None, model.max_model_len
    )
    return GenerationPlan(
        model=model, request=request.common, request_id=request_id, prompts=[prompt], max_tokens=[max_tokens]
    )


async def tokenize_chat(chat: ChatInput, model: ServedModel, pool: TokenizerPool) -> list[int]:
    """Token ids of the rendered conversation. Raises ApiError where the template refuses it."""
    template = model.chat_template(bool(chat.tools))

    def run() -> list[int]:
        text = template.render(
            chat.messages,
            tools=chat.tools,
            documents=chat.documents,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            variables=chat.template_variables,
        )
        return model.tokenizer.encode([text], chat.add_special_tokens)[0]

    try:
        return await pool.run(run)
    except ChatTemplateError as error:
        raise invalid(str(error), "messages") from error


class ChatRenderer:
    """Writes one chat completion's answer, whole or as events."""

    def __init__(self, plan: GenerationPlan, generation: Generation, created_unix_s: int) -> None:
        self._plan = plan
        self._request = plan.request
        self._generation = generation
        self._head = {"id": f"chatcmpl-{plan.request_id}", "created": created_unix_s, "model": plan.model.name}
        self._namer = TokenNamer(plan.model.tokenizer, plan.request.return_tokens_as_token_ids)
        self._wants_logprobs = plan.request.sampling.HasField("logprobs")

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
            if self._request.return_token_ids and index == 0:
                payload["prompt_token_ids"] = self._plan.prompts[0]
            events.append(sse.event(payload))
        return b"".join(events)

    def event(self, delta: Delta) -> bytes:
        """The event for a delta, empty if there is nothing new.

        Tokens make an event even where they have no text (a part of a character, a special token): clients that
        measure take the gaps between events for those between tokens.
        """
        if not (delta.text or delta.token_ids or delta.finish_reason):
            return b""
        choice: dict[str, object] = {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text or not delta.finish_reason else {},
            "logprobs": self._logprobs(delta) if delta.token_ids else None,
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason:
            choice["stop_reason"] = delta.stop_reason
        if self._request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return sse.event(self._chunk(choice, delta.index))

    def last_event(self, usage: UsageCount | None, receipt: Receipts | None) -> bytes:
        """The event after the last choice's end: what the client asked to be told of the whole."""
        payload: dict[str, object] = {**self._head, "object": "chat.completion.chunk", "choices": []}
        if usage is not None:
            payload["usage"] = usage.to_json()
        if receipt is not None:
            payload["receipt"] = receipt
        return sse.event(payload)

    def response(self, deltas: Sequence[Delta], usage: UsageCount, receipt: Receipts | None) -> bytes:
        """The whole answer; `deltas` holds one complete delta per sequence, in order."""
        choices = []
        for delta in deltas:
            choice: dict[str, object] = {
                "index": delta.index,
                "message": {"role": "assistant", "content": delta.text, "refusal": None},
                "logprobs": self._logprobs(delta),
                "finish_reason": delta.finish_reason,
                "stop_reason": delta.stop_reason,
            }
            if self._request.return_token_ids:
                choice["token_ids"] = delta.token_ids
            choices.append(choice)
        payload: dict[str, object] = {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage.to_json(),
        }
        if self._request.return_token_ids:
            payload["prompt_token_ids"] = self._plan.prompts[0]
        if self._request.sampling.HasField("prompt_logprobs"):
            payload["prompt_logprobs"] = prompt_logprobs(self._plan.model.tokenizer, deltas[0].prompt_logprobs)
        if receipt is not None:
            payload["receipt"] = receipt
        return orjson.dumps(payload)

    def _chunk(self, choice: dict[str, object], index: int) -> dict[str, object]:
        payload: dict[str, object] = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        if self._request.continuous_usage:
            payload["usage"] = self._generation.usage_of(index).to_json()
        elif self._request.include_usage:
            payload["usage"] = None
        return payload

    def _logprobs(self, delta: Delta) -> dict[str, object] | None:
        if not self._wants_logprobs:
            return None
        return chat_logprobs(self._namer, delta.token_ids, delta.logprobs, self._request.sampling.logprobs)
