"""Formats log probabilities for completions, for chat, and as vLLM's prompt_logprobs.

Position by position, as JSON: an answer may have hundreds of thousands of alternatives, which as objects would take
much memory, and all at once a long time.
"""

from __future__ import annotations

import orjson
from tandem.v1 import worker_pb2 as pb

from services.router.openai.columns import Columns
from services.router.text import ModelTokenizer

# What stands for minus infinity, which JSON cannot say; the value that OpenAI and vLLM use.
_LOWEST = -9999.0


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST  # NaN too becomes the lowest


class TokenNamer:
    """Writes a token into an answer: as text, or as `token_id:N` where the client asked for that."""

    def __init__(self, tokenizer: ModelTokenizer, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_token_ids else self._tokenizer.token_text(token_id)

    def bytes_of(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)


class CompletionLogprobs:
    """The completions form of one choice, position by position: `text_offset` counts on."""

    FIELDS = ("text_offset", "token_logprobs", "tokens", "top_logprobs")

    def __init__(self, tokenizer: ModelTokenizer, as_token_ids: bool, skip_special_tokens: bool) -> None:
        self._namer = TokenNamer(tokenizer, as_token_ids)
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._num_characters = 0  # begun so far

    def add(self, token_id: int, position: pb.PositionLogprobs, to: Columns) -> None:
        """Adds the next one to the columns of `FIELDS`."""
        name, logprob, top = self._namer.name(token_id), None, b"null"  # the prompt's first token has no others
        if position.HasField("chosen"):
            logprob = _finite(position.chosen.logprob)
            others = {self._namer.name(token.token_id): _finite(token.logprob) for token in reversed(position.top)}
            others = dict(reversed(others.items()))  # of two tokens with one text the likelier stays
            others.setdefault(name, logprob)
            top = orjson.dumps(others)
        to["text_offset"].add(b"%d" % self._offset(token_id))
        to["token_logprobs"].add(orjson.dumps(logprob))
        to["tokens"].add(orjson.dumps(name))
        to["top_logprobs"].add(top)

    def _offset(self, token_id: int) -> int:
        """Returns where in the text the token begins, in characters; inside a character: where that begins."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return self._num_characters
        content = self._tokenizer.token_bytes(token_id)
        is_continuation = bool(content) and content[0] & 0xC0 == 0x80
        offset = self._num_characters - (is_continuation and self._num_characters > 0)
        self._num_characters += sum(byte & 0xC0 != 0x80 for byte in content)
        return offset


def chat_position(namer: TokenNamer, token_id: int, position: pb.PositionLogprobs, num_top: int) -> bytes:
    """An entry of the chat form's `content`, as JSON."""
    entry = _chat_entry(namer, token_id, position.chosen.logprob)
    entry["top_logprobs"] = [_chat_entry(namer, token.token_id, token.logprob) for token in position.top[:num_top]]
    return orjson.dumps(entry)


def _chat_entry(namer: TokenNamer, token_id: int, logprob: float) -> dict[str, object]:
    return {"token": namer.name(token_id), "logprob": _finite(logprob), "bytes": list(namer.bytes_of(token_id))}


def prompt_position(tokenizer: ModelTokenizer, position: pb.PositionLogprobs) -> bytes:
    """vLLM's form as JSON: null for the prompt's first token, else token id to logprob, rank and text."""
    if not position.HasField("chosen"):
        return b"null"
    return orjson.dumps(
        {
            str(token.token_id): {
                "logprob": _finite(token.logprob),
                "rank": token.rank,
                "decoded_token": tokenizer.token_text(token.token_id),
            }
            for token in (position.chosen, *position.top)
        }
    )
