"""Refuses a large body for the sizes of its fields, counted in its bytes, before one of them is decoded.

Nine hundred thousand token ids take 2 ms to count in slices, and 26 to decode in one go, in which nobody else's
request gets on. So what no model takes is refused here; what is left is decoded, and looked at in full.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
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
# As an object, with its place in a list; and as an empty one.
_VALUE_BYTES, _CONTAINER_BYTES = 40, 256
# In UTF-8, or as the first half of a pair of escapes, of which a slice may have the beginning.
_BEYOND_16_BITS = re.compile(rb"[\xf0-\xff]|\\u([dD]([89abAB]|\Z)|\Z)")
# Of an escape for each of its backslashes, rounded up: two of six characters each are one.
_MOST_ESCAPED = 6


class _Fields(Struct):
    """What is looked at of a body. No object is made for the rest, of which there may be a million."""

    model: str | None = None
    messages: Raw = Raw(b"[]")
    prompt: Raw = Raw()
    tokens: Raw = Raw()


class _Message(Struct):
    """A message, of which nothing is read."""


class Count(NamedTuple):
    """What a piece of JSON has, strings left out; and what it will take."""

    num_commas: int
    num_containers: int
    has_strings: bool
    decoded_bytes: int
    """About as much memory as its objects take."""


def count(content: bytes | bytearray | memoryview) -> Count:
    """Count in slices, between and within which others may run.

    Raises ApiError where there are more values than any body may have.
    """
    num_commas, num_containers, num_string_bytes, has_strings, in_string, char_bytes = 0, 0, 0, False, False, 1
    for part in _slices(content):
        char_bytes = max(char_bytes, _char_bytes(part))
        chars = np.frombuffer(part.replace(rb"\\", b"__").replace(rb"\"", b"__"), np.uint8)
        quotes = chars == _QUOTE
        if quotes.any():
            has_strings = True
            quotes[0] ^= in_string
            within = np.logical_xor.accumulate(quotes)  # from an opening quote up to the closing one
            in_string = bool(within[-1])
            chars = chars[~within]
            num_string_bytes += len(part) - len(chars)
        elif in_string:
            num_string_bytes += len(part)
            continue
        num_commas += int(np.count_nonzero(chars == _COMMA))
        num_containers += int(np.count_nonzero(chars == _LIST)) + int(np.count_nonzero(chars == _OBJECT))
    if num_commas >= MAX_VALUES or num_containers > MAX_CONTAINERS:
        raise invalid(
            f"The body has too many values: {MAX_VALUES} are taken, of which {MAX_CONTAINERS} may be lists or objects."
        )
    decoded_bytes = num_string_bytes * char_bytes + num_commas * _VALUE_BYTES + num_containers * _CONTAINER_BYTES
    return Count(num_commas, num_containers, has_strings, decoded_bytes)


def _slices(content: bytes | bytearray | memoryview) -> Iterator[bytes]:
    """Its parts, none of which ends behind the backslash of an escape."""
    whole, start = memoryview(content), 0
    while start < len(whole):
        part = bytes(whole[start : start + _SLICE_BYTES])
        if (len(part) - len(part.rstrip(b"\\"))) % 2:
            part = bytes(whole[start : start + _SLICE_BYTES + 1])
        start += len(part)
        yield part


def _char_bytes(part: bytes) -> int:
    """Of a string with such characters; it has as many for each."""
    if part.isascii() and b"\\u" not in part:
        return 1
    if _BEYOND_16_BITS.search(part):
        return 4
    return 2


def fewest_chars(text: memoryview) -> int:
    """A JSON string has at least so many characters: as many as it has bytes that begin one, but for its escapes."""
    num_chars = 0
    for part in _slices(text):
        begins = np.count_nonzero(np.frombuffer(part, np.uint8) & 0xC0 != 0x80)
        num_chars += int(begins) - _MOST_ESCAPED * part.count(b"\\")
    return num_chars - 2  # quotes


class SizeLimits(NamedTuple):
    """What a model takes."""

    max_tokens: int
    chars_per_token: int
    """None has more."""


def check_sizes(content: bytes | bytearray, find_limits: Callable[[str | None], SizeLimits], max_prompts: int) -> Count:
    """Count what a body has, and raise ApiError for more characters, token ids or messages than the model takes, of
    which `find_limits` may raise one itself, and for more than `max_prompts` prompts. What is no JSON, or of another
    type, the decoder sees to.
    """
    counted = count(content)
    try:
        fields = msgspec.json.decode(content, type=_Fields)
        limits = find_limits(fields.model)
        messages, prompt = memoryview(fields.messages), memoryview(fields.prompt)
        if messages[0] != _LIST:
            return counted
        if count(messages).num_containers > limits.max_tokens:  # with their parts, and what else they have
            num_messages = len(msgspec.json.decode(messages, type=list[_Message]))
            if num_messages > limits.max_tokens:  # each has a token at least
                raise prompt_too_long(limits.max_tokens, num_messages, "messages")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return counted
    if prompt and prompt[0] == _LIST:
        _check_prompts(count(prompt), limits.max_tokens, max_prompts)
    elif prompt and (at_least := -(-fewest_chars(prompt) // limits.chars_per_token)) > limits.max_tokens:
        raise prompt_too_long(limits.max_tokens, at_least, "prompt")
    if (num_ids := count(memoryview(fields.tokens)).num_commas + 1) > limits.max_tokens:
        raise too_many_ids("tokens", num_ids, limits.max_tokens)
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
