"""Parses server-sent events line by line, without I/O: a stream cut anywhere parses the same."""

from __future__ import annotations

import json
from dataclasses import dataclass


class BadStream(ValueError):
    """The server sent something that is no chunk of an OpenAI stream."""


@dataclass(frozen=True)
class Chunk:
    """One event of a stream: whether it carries tokens, the usage if it is there, and the error if it is one."""

    has_tokens: bool = False
    usage: dict[str, object] | None = None
    error: str = ""
    is_done: bool = False


def parse_line(line: bytes) -> Chunk | None:
    """A chunk, where the line is one: `data: {...}` or `data: [DONE]`. Comments, blank lines and other fields are None.

    OpenAI's streams have one line of data per event. Raises BadStream.
    """
    if not line.startswith(b"data:"):
        return None
    data = line[5:].strip()
    if data == b"[DONE]":
        return Chunk(is_done=True)
    try:
        event = json.loads(data)
    except ValueError as error:
        raise BadStream(f"a chunk is no JSON: {data[:200]!r}") from error
    if not isinstance(event, dict):
        raise BadStream(f"a chunk is no object: {data[:200]!r}")
    if event.get("error"):
        return Chunk(error=_message_of(event["error"]))
    usage = event.get("usage")
    choices = event.get("choices")
    has_tokens = isinstance(choices, list) and any(map(_carries_tokens, choices))
    return Chunk(has_tokens, usage if isinstance(usage, dict) else None)


def _carries_tokens(choice: object) -> bool:
    """Text, reasoning or token ids. An empty text without an end is a token too, whose characters are not complete; the
    first chunk of a chat has a role alone, and the last may have a finish reason alone: these carry none."""
    if not isinstance(choice, dict):
        return False
    if choice.get("token_ids"):
        return True
    if "delta" in choice:
        delta = choice["delta"] or {}
        return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))
    return bool(choice.get("text")) or not choice.get("finish_reason")


def _message_of(error: object) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
