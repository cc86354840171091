"""Refuses a large body for the sizes of its fields, counted in its bytes, before one of them is decoded.

Nine hundred thousand token ids take 2 ms to count in slices, and 26 to decode in one go, in which nobody else's
request gets on. So what no model takes is refused here; what is left is decoded, and looked at in full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np
from msgspec import Raw, Struct

from services.router.errors import ApiError, invalid
from services.router.openai.generation import prompt_too_long

MAX_VALUES = 1 << 20
"""Of JSON values in a body, which are token ids where there are many."""
MAX_CONTAINERS = 1 << 16
"""Of lists and objects: prompts of token ids, messages and their parts."""

_SLICE_BYTES = 1 << 18
_QUOTE, _COMMA, _LIST, _OBJECT = b'",[{'


class _Fields(Struct):
    """What is looked at of a body. No object is made for the rest, of which there may be a million."""

    model: str | None = None
    messages: Raw = Raw(b"[]")
    prompt: Raw = Raw()
    tokens: Raw = Raw()


class _Message(Struct):
    """A message, of which nothing is read."""


class Count(NamedTuple):
    """What a piece of JSON has, strings left out."""

    num_commas: int
    num_containers: int
    has_strings: bool


def count(content: bytes | memoryview) -> Count:
    """Count in slices, between and within which others may run."""
    content = bytes(content)
    if b"\\" in content:
        content = content.replace(rb"\\", b"__").replace(rb"\"", b"__")
    num_commas, num_containers, has_strings, in_string = 0, 0, False, False
    for start in range(0, len(content), _SLICE_BYTES):
        chars = np.frombuffer(content, np.uint8, min(_SLICE_BYTES, len(content) - start), start)
        quotes = chars == _QUOTE
        if quotes.any():
            has_strings = True
            quotes[0] ^= in_string
            within = np.logical_xor.accumulate(quotes)  # from an opening quote up to the closing one
            in_string = bool(within[-1])
            chars = chars[~within]
        elif in_string:
            continue
        num_commas += int(np.count_nonzero(chars == _COMMA))
        num_containers += int(np.count_nonzero(chars == _LIST)) + int(np.count_nonzero(chars == _OBJECT))
    return Count(num_commas, num_containers, has_strings)


def check_sizes(content: bytes, find_limit: Callable[[str | None], int], max_prompts: int) -> Count:
    """Count what a body has, and raise ApiError for more token ids or messages than `find_limit` says for the model,
    which may raise one itself, and for more than `max_prompts` prompts. What is no JSON, of another type, or has too
    many values of any kind, the decoder sees to.
    """
    counted = count(content)
    if counted.num_commas >= MAX_VALUES or counted.num_containers > MAX_CONTAINERS:
        return counted
    try:
        fields = msgspec.json.decode(content, type=_Fields)
        max_tokens = find_limit(fields.model)
        messages, prompt = memoryview(fields.messages), memoryview(fields.prompt)
        if messages[0] != _LIST:
            return counted
        if count(messages).num_containers > max_tokens:  # with their parts, and what else they have
            num_messages = len(msgspec.json.decode(messages, type=list[_Message]))
            if num_messages > max_tokens:  # each has a token at least
                raise prompt_too_long(max_tokens, num_messages, "messages")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return counted
    if prompt and prompt[0] == _LIST:
        _check_prompts(count(prompt), max_tokens, max_prompts)
    if (num_ids := count(memoryview(fields.tokens)).num_commas + 1) > max_tokens:
        raise too_many_ids("tokens", num_ids, max_tokens)
    return counted


def too_many_ids(name: str, num_ids: int, limit: int) -> ApiError:
    """The error of a list that is too long."""
    return invalid(f"`{name}` has {num_ids} tokens; {limit} are taken.", name)


def _check_prompts(counted: Count, max_tokens: int, max_prompts: int) -> None:
    num_commas, num_lists = counted.num_commas, counted.num_containers - 1
    num_prompts = num_lists or (num_commas + 1 if counted.has_strings else 1)
    if num_prompts > max_prompts:
        raise invalid(f"`prompt` has {num_prompts} prompts; a request may have {max_prompts} sequences.", "prompt")
    if not counted.has_strings and (longest := -(-(num_commas + 1) // num_prompts)) > max_tokens:
        raise prompt_too_long(max_tokens, longest, "prompt")
