"""Serves /tokenize and /detokenize."""

from __future__ import annotations

import orjson

from services.router.errors import invalid
from services.router.openai.bodies import DetokenizeBody, TokenizeBody
from services.router.openai.chat import tokenize_chat
from services.router.openai.completions import tokenize_texts
from services.router.openai.requests import check_token_ids
from services.router.openai.sizes import too_many_ids
from services.router.text import ClientPool, GoOn, ServedModel

# What does not fit into the context is counted all the same, so that clients can learn by how much: up to so much.
_MIN_TOKENS = 1 << 17


async def tokenize(body: TokenizeBody, model: ServedModel, pool: ClientPool) -> bytes:
    """The answer. Raises ApiError."""
    limit = longest_text(model)
    if body.messages is not None:
        token_ids = await tokenize_chat(body, model, pool, limit)
    elif body.prompt is not None:
        (token_ids,) = await tokenize_texts([body.prompt], body.add_special_tokens is not False, model, pool, limit)
    else:
        raise invalid("Either `prompt` or `messages` is required.", "prompt")

    def answer(go_on: GoOn) -> bytes:
        names = [model.tokenizer.token_name(token_id) for token_id in token_ids] if body.return_token_strs else None
        told = {"count": len(token_ids), "max_model_len": model.max_model_len}
        return orjson.dumps(told | {"tokens": token_ids.tolist(), "token_strs": names})

    return await pool.run(answer, len(token_ids))


async def detokenize(body: DetokenizeBody, model: ServedModel, pool: ClientPool) -> bytes:
    """The answer. Raises ApiError."""
    token_ids, limit = check_token_ids(body.tokens, "tokens", model.files.vocab_size), longest_text(model)
    if len(token_ids) > limit:
        raise too_many_ids("tokens", len(token_ids), limit)

    def answer(go_on: GoOn) -> bytes:
        return orjson.dumps({"prompt": model.tokenizer.decode(token_ids, skip_special_tokens=False)})

    return await pool.run(answer, len(token_ids))


def longest_text(model: ServedModel) -> int:
    """Tokens that are counted or turned into text."""
    return max(2 * model.max_model_len, _MIN_TOKENS)
