"""Formats log probabilities for completions, for chat, and as vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.v1 import worker_pb2 as pb

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
    """The completions form of one choice, piece by piece: `text_offset` counts on from piece to piece."""

    def __init__(self, tokenizer: ModelTokenizer, as_token_ids: bool, skip_special_tokens: bool) -> None:
        self._namer = TokenNamer(tokenizer, as_token_ids)
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._num_characters = 0  # begun so far

    def format(self, token_ids: Sequence[int], positions: Sequence[pb.PositionLogprobs]) -> dict[str, object]:
        """`positions[i]` belongs to `token_ids[i]`; one without `chosen` (the prompt's first) gives nulls."""
        names, offsets = [], []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token_id, position in zip(token_ids, positions, strict=True):
            names.append(self._namer.name(token_id))
            offsets.append(self._offset(token_id))
            if not position.HasField("chosen"):
                logprobs.append(None)
                tops.append(None)
                continue
            logprobs.append(_finite(position.chosen.logprob))
            top = {self._namer.name(token.token_id): _finite(token.logprob) for token in reversed(position.top)}
            top = dict(reversed(top.items()))  # of two tokens with one text the likelier stays
            top.setdefault(names[-1], _finite(position.chosen.logprob))
            tops.append(top)
        return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": names, "top_logprobs": tops}

    def _offset(self, token_id: int) -> int:
        """Returns where in the text the token begins, in characters; inside a character: where that begins."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return self._num_characters
        content = self._tokenizer.token_bytes(token_id)
        is_continuation = bool(content) and content[0] & 0xC0 == 0x80
        offset = self._num_characters - (is_continuation and self._num_characters > 0)
        self._num_characters += sum(byte & 0xC0 != 0x80 for byte in content)
        return offset


def chat_logprobs(
    namer: TokenNamer, token_ids: Sequence[int], positions: Sequence[pb.PositionLogprobs], num_top: int
) -> dict[str, object]:
    """The chat form: `{"content": [...]}`."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        entry = _chat_entry(namer, token_id, position.chosen.logprob)
        entry["top_logprobs"] = [_chat_entry(namer, token.token_id, token.logprob) for token in position.top[:num_top]]
        content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(namer: TokenNamer, token_id: int, logprob: float) -> dict[str, object]:
    return {"token": namer.name(token_id), "logprob": _finite(logprob), "bytes": list(namer.bytes_of(token_id))}


def prompt_logprobs(
    tokenizer: ModelTokenizer, positions: Sequence[pb.PositionLogprobs]
) -> list[dict[str, dict[str, object]] | None]:
    """vLLM's form: per prompt token, null for the first, else token id to logprob, rank and text."""
    found: list[dict[str, dict[str, object]] | None] = []
    for position in positions:
        if not position.HasField("chosen"):
            found.append(None)
            continue
        found.append(
            {
                str(token.token_id): {
                    "logprob": _finite(token.logprob),
                    "rank": token.rank,
                    "decoded_token": tokenizer.token_text(token.token_id),
                }
                for token in (position.chosen, *position.top)
            }
        )
    return found
