"""Serves /v1/completions: turns a checked body into token ids, and deltas into text_completion objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from services.router import sse
from services.router.openai.choice import Delta
from services.router.openai.generation import Generation, GenerationPlan, Receipts, UsageCount, tokens_to_generate
from services.router.openai.logprobs import CompletionLogprobs, prompt_logprobs
from services.router.openai.requests import DEFAULT_COMPLETION_TOKENS, CompletionRequest
from services.router.text import ServedModel, TokenizerPool


@dataclass(frozen=True)
class CompletionInput:
    """The plan, and the prompts' texts where they are echoed."""

    plan: GenerationPlan
    echoed: Sequence[str] | None


async def plan_completion(
    request: CompletionRequest, model: ServedModel, request_id: str, pool: TokenizerPool
) -> CompletionInput:
    """Tokenizes what is text. Raises ApiError where a prompt does not fit."""
    prompts = await _tokenize(request, model, pool)
    echoed = None
    if request.echo:
        echoed = await pool.run(lambda: _texts(request, model))
    asked = request.common.max_tokens
    plan = GenerationPlan(
        model=model,
        request=request.common,
        request_id=request_id,
        prompts=prompts,
        max_tokens=[
            tokens_to_generate(request.common, len(prompt), "prompt", DEFAULT_COMPLETION_TOKENS, model.max_model_len)
            for prompt in prompts
        ],
        discard_generated=asked == 0,
    )
    return CompletionInput(plan, echoed)


def _texts(request: CompletionRequest, model: ServedModel) -> list[str]:
    decode, skips = model.tokenizer.decode, request.common.skip_special_tokens
    return [prompt if isinstance(prompt, str) else decode(prompt, skips) for prompt in request.prompts]


async def _tokenize(request: CompletionRequest, model: ServedModel, pool: TokenizerPool) -> list[list[int]]:
    texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]
    if not texts:
        return [prompt for prompt in request.prompts if not isinstance(prompt, str)]
    return await pool.run(lambda: model.tokenizer.encode(texts, request.add_special_tokens))


class CompletionRenderer:
    """Writes one completion's answer, whole or as events."""

    def __init__(self, completion: CompletionInput, generation: Generation, created_unix_s: int) -> None:
        plan = completion.plan
        self._plan = plan
        self._request = plan.request
        self._echoed = completion.echoed
        self._generation = generation
        self._head = {"id": f"cmpl-{plan.request_id}", "created": created_unix_s, "model": plan.model.name}
        self._wants_logprobs = plan.request.sampling.HasField("logprobs")
        self._logprobs = [
            CompletionLogprobs(
                plan.model.tokenizer, plan.request.return_tokens_as_token_ids, plan.request.skip_special_tokens
            )
            for _ in range(plan.num_sequences)
        ]
        self._begun = [False] * plan.num_sequences

    def opening(self) -> bytes:
        """Opens a stream with nothing: no token, no chunk."""
        return b""

    def event(self, delta: Delta) -> bytes:
        """The event for a delta, empty if there is nothing new.

        Tokens make an event even where they have no text (a part of a character, a special token): clients that
        measure take the gaps between events for those between tokens.
        """
        is_first = not self._begun[delta.index]
        has_echo = is_first and self._echoed is not None
        if not (delta.text or delta.token_ids or delta.finish_reason or has_echo):
            return b""
        choice = self._choice(delta)
        if self._request.return_token_ids:
            choice["prompt_token_ids"] = self._prompt_of(delta.index) if is_first else None
        payload = {**self._head, "object": "text_completion", "choices": [choice]}
        if self._request.continuous_usage:
            payload["usage"] = self._generation.usage_of(delta.index).to_json()
        elif self._request.include_usage:
            payload["usage"] = None
        return sse.event(payload)

    def last_event(self, usage: UsageCount | None, receipt: Receipts | None) -> bytes:
        """The event after the last choice's end: what the client asked to be told of the whole."""
        payload: dict[str, object] = {**self._head, "object": "text_completion", "choices": []}
        if usage is not None:
            payload["usage"] = usage.to_json()
        if receipt is not None:
            payload["receipt"] = receipt
        return sse.event(payload)

    def response(self, deltas: Sequence[Delta], usage: UsageCount, receipt: Receipts | None) -> bytes:
        """The whole answer; `deltas` holds one complete delta per sequence, in order."""
        choices = []
        for delta in deltas:
            choice = self._choice(delta)
            if self._request.return_token_ids:
                choice["prompt_token_ids"] = self._prompt_of(delta.index)
            if self._request.sampling.HasField("prompt_logprobs"):
                choice["prompt_logprobs"] = prompt_logprobs(self._plan.model.tokenizer, delta.prompt_logprobs)
            choices.append(choice)
        payload = {**self._head, "object": "text_completion", "choices": choices, "usage": usage.to_json()}
        if receipt is not None:
            payload["receipt"] = receipt
        return orjson.dumps(payload)

    def _choice(self, delta: Delta) -> dict[str, object]:
        text, token_ids, positions = delta.text, delta.token_ids, delta.logprobs
        if self._echoed is not None and not self._begun[delta.index]:
            text = self._echoed[delta.index // self._request.n] + text
            token_ids = [*self._prompt_of(delta.index), *token_ids]
            positions = [*delta.prompt_logprobs, *positions]
        self._begun[delta.index] = True
        choice: dict[str, object] = {
            "index": delta.index,
            "text": text,
            "logprobs": self._logprobs[delta.index].format(token_ids, positions) if self._wants_logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _prompt_of(self, index: int) -> list[int]:
        return self._plan.prompts[index // self._request.n]
