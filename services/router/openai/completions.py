"""Serves /v1/completions: turns a checked body into token ids, and deltas into text_completion objects."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from services.router.config import RouterConfig
from services.router.errors import invalid
from services.router.openai.bodies import CompletionBody
from services.router.openai.choice import Delta
from services.router.openai.columns import columns
from services.router.openai.generation import Generation, GenerationPlan, prompt_too_long, tokens_to_generate
from services.router.openai.logprobs import CompletionLogprobs, prompt_position
from services.router.openai.renderer import Renderer, in_turns
from services.router.openai.requests import (
    DEFAULT_COMPLETION_TOKENS,
    GenerationRequest,
    check_completion,
    check_prompts,
)
from services.router.openai.sizes import MAX_VALUES
from services.router.text import SHORT_CHARS, ClientPool, GoOn, PromptTooLong, ServedModel, at_once

_FEW_TEXTS = 32


async def plan_completion(
    body: CompletionBody, model: ServedModel, config: RouterConfig, request_id: str, pool: ClientPool
) -> GenerationPlan:
    """Checks the body and tokenizes what is text. Raises ApiError."""

    def check() -> tuple[tuple[str | array[int], ...], GenerationRequest]:
        given = check_prompts(body.prompt, model.files.vocab_size)
        return given, check_completion(body, given, model, config)

    given, request = await pool.look_at(check, body.num_ids())
    prompts = await _tokenize(given, body.add_special_tokens, model, pool)
    limits = [
        tokens_to_generate(request, len(prompt), "prompt", DEFAULT_COMPLETION_TOKENS, model.max_model_len)
        for prompt in prompts
    ]

    return GenerationPlan(
        model,
        request,
        request_id,
        prompts,
        limits,
        discard_generated=request.max_tokens == 0,
        echoed=await _texts(given, body.skip_special_tokens, model, pool) if body.echo else None,
    )


async def _tokenize(
    prompts: Sequence[str | array[int]], add_special_tokens: bool, model: ServedModel, pool: ClientPool
) -> list[array[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return [prompt for prompt in prompts if not isinstance(prompt, str)]
    return await tokenize_texts(texts, add_special_tokens, model, pool, model.max_model_len)


async def tokenize_texts(
    texts: Sequence[str], add_special_tokens: bool, model: ServedModel, pool: ClientPool, max_tokens: int
) -> list[array[int]]:
    """Token ids of each. Raises ApiError where one has more than `max_tokens`, or all of them too many."""

    def run(go_on: GoOn) -> list[array[int]]:
        tokenized, room = [], MAX_VALUES
        for text in texts:
            tokenized.append(model.tokenizer.encode_bounded(text, add_special_tokens, max_tokens, go_on))
            room -= len(tokenized[-1])
            if room < 0:
                raise invalid(f"The prompts together have more than {MAX_VALUES} tokens.", "prompt")
        return tokenized

    num_chars = sum(map(len, texts))
    try:
        is_short = num_chars <= SHORT_CHARS and len(texts) <= _FEW_TEXTS
        return at_once(run) if is_short else await pool.run(run, num_chars)
    except PromptTooLong as error:
        raise prompt_too_long(max_tokens, error.at_least, "prompt") from error


async def _texts(
    prompts: Sequence[str | array[int]], skips_special_tokens: bool, model: ServedModel, pool: ClientPool
) -> list[str]:
    def run(go_on: GoOn) -> list[str]:
        texts = []
        for prompt in prompts:
            go_on()
            texts.append(prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt, skips_special_tokens))
        return texts

    return await pool.run(run, sum(map(len, prompts)))


class CompletionRenderer(Renderer):
    """Writes one completion's answer."""

    id_prefix, answer, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, generation: Generation, created_unix_s: int) -> None:
        super().__init__(generation, created_unix_s)
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._begun = [False] * self._plan.num_sequences

    async def show_logprobs(self, delta: Delta) -> None:
        if self._request.sampling.HasField("prompt_logprobs") and not self._body.stream:
            tokenizer, of_prompt, shown = self._plan.model.tokenizer, delta.prompt_logprobs, delta.shown_prompt_logprobs
            await in_turns(lambda i: shown.add(prompt_position(tokenizer, of_prompt[i])), len(of_prompt))
        if self._wants_logprobs:
            pairs = list(zip(delta.token_ids, delta.logprobs, strict=True))
            if self._plan.echoed is not None and delta.prompt_logprobs:
                pairs = [*zip(self._prompt_of(delta.index), delta.prompt_logprobs, strict=True), *pairs]
            form, delta.shown_logprobs = self._form(delta.index), columns(CompletionLogprobs.FIELDS)
            await in_turns(lambda i: form.add(*pairs[i], delta.shown_logprobs), len(pairs))
        delta.logprobs, delta.prompt_logprobs = [], []

    def _form(self, index: int) -> CompletionLogprobs:
        if index not in self._logprobs:
            body, tokenizer = self._body, self._plan.model.tokenizer
            self._logprobs[index] = CompletionLogprobs(
                tokenizer, body.return_tokens_as_token_ids, body.skip_special_tokens
            )
        return self._logprobs[index]

    def _news(self, delta: Delta) -> dict[str, object] | None:
        is_first = not self._begun[delta.index]
        has_echo = is_first and self._plan.echoed is not None
        if not (delta.text or delta.token_ids or delta.finish_reason or has_echo):
            return None
        choice = self._choice(delta)
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = self._prompt_of(delta.index) if is_first else None
        return choice

    def _whole(self, delta: Delta) -> dict[str, object]:
        choice = self._choice(delta)
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = self._prompt_of(delta.index)
        if self._request.sampling.HasField("prompt_logprobs"):
            choice["prompt_logprobs"] = delta.shown_prompt_logprobs
        return choice

    def _choice(self, delta: Delta) -> dict[str, object]:
        text = delta.text
        if self._plan.echoed is not None and not self._begun[delta.index]:
            text = self._plan.echoed[delta.index // self._body.n] + text
        self._begun[delta.index] = True
        choice: dict[str, object] = {
            "index": delta.index,
            "text": text,
            "logprobs": delta.shown_logprobs if self._wants_logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _prompt_of(self, index: int) -> Sequence[int]:
        return self._plan.prompts[index // self._body.n]
