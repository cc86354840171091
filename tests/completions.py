"""A client of a stack's router that asks for greedy continuations of token ids, and what it is told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import isclose
from typing import Any

import httpx

from tests.stack import Stack


@dataclass(frozen=True)
class Answer:
    """A completion with one choice, and its receipt."""

    content: dict[str, Any]

    @property
    def tokens(self) -> list[int]:
        (choice,) = self.content["choices"]
        return list(choice["token_ids"])

    @property
    def num_cached(self) -> int:
        return int(self.content["usage"]["prompt_tokens_details"]["cached_tokens"])

    @property
    def receipt(self) -> dict[str, Any]:
        (sequence,) = self.content["receipt"]["sequences"]
        return dict(sequence)


class Client:
    """An async context manager. `fields` of a request are added to its body, or replace what is there."""

    def __init__(self, stack: Stack, num_new_tokens: int, url: str = "", max_connections: int = 100) -> None:
        """`url`: of another router than the stack's first."""
        limits = httpx.Limits(max_connections=max_connections)
        self.http = httpx.AsyncClient(base_url=url or stack.url, timeout=120, limits=limits)
        self._body = {"model": "m", "max_tokens": num_new_tokens, "temperature": 0, "ignore_eos": True}
        self._body |= {"return_token_ids": True, "receipt": True}

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def complete(self, prompt: list[int], **fields: object) -> Answer:
        response = await self.http.post("/v1/completions", json={**self._body, "prompt": prompt, **fields})
        assert response.status_code == 200, response.text
        return Answer(response.json())

    @asynccontextmanager
    async def stream(self, prompt: list[int], **fields: object) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """A stream's events, an error among them."""
        body = {**self._body, "prompt": prompt, "stream": True, **fields}
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            data = (line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: "))
            yield (json.loads(event) async for event in data if event != "[DONE]")


def about_equal(found: object, expected: object) -> bool:
    """Log probabilities may differ in their last bits, as the same tokens computed in other chunks do."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(about_equal(found[key], expected[key]) for key in found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(about_equal, found, expected))
    if isinstance(found, float) and isinstance(expected, float):
        return isclose(found, expected, rel_tol=1e-3, abs_tol=1e-4)
    return found == expected
