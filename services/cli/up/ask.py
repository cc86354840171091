"""Asks the stack's own router, as a client on this machine: which workers it has, and for one answer.

Whoever asks sets the deadline: that of the whole start.
"""

from __future__ import annotations

import asyncio
import json
import ssl

from services.cli.up.spec import Stack

_RETRY_S = 0.2
_NOT_THERE = 0
_NOT_YET = frozenset({_NOT_THERE, 429, 503})


class RequestFailed(Exception):
    """The router refused the first request, or failed at it."""


class ModelNotLoaded(RequestFailed):
    """The router cannot load the model's tokenizer or its templates; the message says why."""


async def connected_workers(stack: Stack) -> set[str]:
    """The ids of the workers and store nodes that the router can use; empty while it does not answer."""
    status, body = await _ask(stack, "GET", "/debug/workers")
    if status == _NOT_THERE:
        return set()
    if status != 200:
        raise RequestFailed(f"GET /debug/workers: {_message(status, body)}")
    return {worker["worker_id"] for worker in json.loads(body)["workers"] if worker["connected"]}


async def send_first_request(stack: Stack) -> None:
    """Returns when one request has been answered: it takes the way of all, through a prefill worker if there is one.

    Tried again while the router says that it is too early, or is not there. Raises RequestFailed.
    """
    body = {
        "model": stack.served_model_name,
        "prompt": "Hello" + " hello" * stack.first_prompt_words,
        "max_tokens": 1,
        "temperature": 0,
    }
    while True:
        status, answer = await _ask(stack, "POST", "/v1/completions", json.dumps(body).encode())
        if status == 200:
            return
        error = _error(answer)
        if error.get("code") == "model_not_loaded":
            raise ModelNotLoaded(str(error["message"]).removesuffix(" Try again later."))
        if status not in _NOT_YET:
            raise RequestFailed(f"the first request failed: {_message(status, answer)}")
        await asyncio.sleep(_RETRY_S)


def _message(status: int, body: bytes) -> str:
    return f"{status}: {_error(body).get('message') or body[:200].decode(errors='replace')}"


def _error(body: bytes) -> dict[str, object]:
    """OpenAI's error object in an answer, {} where there is none."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


async def _ask(stack: Stack, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of the answer; _NOT_THERE for a router that ends, or does not listen yet."""
    context = ssl._create_unverified_context() if stack.has_tls else None  # our own router, on this machine
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}"]
    if stack.api_key:
        head.append(f"Authorization: Bearer {stack.api_key}")
    try:
        reader, writer = await asyncio.open_connection(stack.reachable_host, stack.port, ssl=context)
        try:
            writer.write("\r\n".join([*head, "", ""]).encode() + body)
            status_line, *headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            lengths = [line.partition(":")[2] for line in headers if line.lower().startswith("content-length:")]
            return int(status_line.split()[1]), await reader.readexactly(int(lengths[0])) if lengths else b""
        finally:
            writer.close()
    except (OSError, asyncio.IncompleteReadError):
        return _NOT_THERE, b""
