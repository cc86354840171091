"""Serves /v1/completions: turns a checked body into token ids, and deltas into text_completion objects."""

from __future__ import annotations

from collections.abc import Sequence

from services.router.config import RouterConfig
from services.router.openai.bodies import CompletionBody
from services.router.openai.choice import Delta
from services.router.openai.generation import Generation, GenerationPlan, tokens_to_generate
from services.router.openai.logprobs import CompletionLogprobs, prompt_logprobs
from services.router.openai.renderer import Renderer
from services.router.openai.requests import DEFAULT_COMPLETION_TOKENS, check_completion, check_prompts
from services.router.text import ServedModel, TokenizerPool


async def plan_completion(
    body: CompletionBody, model: ServedModel, config: RouterConfig, request_id: str, pool: TokenizerPool
) -> GenerationPlan:
    """Checks the body and tokenizes what is text. Raises ApiError."""
    given = check_prompts(body.prompt, model.files.vocab_size)
    request = check_completion(body, given, model, config)
    prompts = await _tokenize(given, body.add_special_tokens, model, pool)
    limits = [
        tokens_to_generate(request, len(prompt), "prompt", DEFAULT_COMPLETION_TOKENS, model.max_model_len)
        for prompt in prompts
    ]

    def texts() -> list[str]:
        decode, skips = model.tokenizer.decode, body.skip_special_tokens
        return [prompt if isinstance(prompt, str) else decode(prompt, skips) for prompt in given]

    return GenerationPlan(
        model,
        request,
        request_id,
        prompts,
        limits,
        discard_generated=request.max_tokens == 0,
        echoed=await pool.run(texts) if body.echo else None,
    )


async def _tokenize(
    prompts: Sequence[str | list[int]], add_special_tokens: bool, model: ServedModel, pool: TokenizerPool
) -> list[list[int]]:
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return [prompt for prompt in prompts if not isinstance(prompt, str)]
    return await pool.run(lambda: model.tokenizer.encode(texts, add_special_tokens))


class CompletionRenderer(Renderer):
    """Writes one completion's answer."""

    id_prefix, answer, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, generation: Generation, created_unix_s: int) -> None:
        super().__init__(generation, created_unix_s)
        body, tokenizer = self._body, self._plan.model.tokenizer
        self._logprobs = [
            CompletionLogprobs(tokenizer, body.return_tokens_as_token_ids, body.skip_special_tokens)
            for _ in range(self._plan.num_sequences)
        ]
        self._begun = [False] * self._plan.num_sequences

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
            choice["prompt_logprobs"] = prompt_logprobs(self._plan.model.tokenizer, delta.prompt_logprobs)
        return choice

    def _choice(self, delta: Delta) -> dict[str, object]:
        text, token_ids, positions = delta.text, delta.token_ids, delta.logprobs
        if self._plan.echoed is not None and not self._begun[delta.index]:
            text = self._plan.echoed[delta.index // self._body.n] + text
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
        if self._body.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _prompt_of(self, index: int) -> list[int]:
        return self._plan.prompts[index // self._body.n]
