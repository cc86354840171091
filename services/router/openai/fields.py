"""Reads the fields of a JSON body. What is malformed becomes a 400 that names the field; JSON null counts as absent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import orjson

from services.router.errors import invalid

INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a request body. Raises ApiError."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"We could not parse the JSON body of your request: {error}") from error
    if not isinstance(content, dict):
        raise invalid("The body of the request must be a JSON object.")
    return content


def boolean(body: dict[str, Any], name: str, default: bool = False) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise invalid(f"`{name}` must be true or false.", name)
    return value


def integer(body: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    return None if value is None else check_integer(value, name, low, high)


def check_integer(value: object, name: str, low: int, high: int) -> int:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # 16.0 is how some clients write 16
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(f"`{name}` must be an integer.", name)
    if not low <= value <= high:
        raise invalid(f"`{name}` must be between {low} and {high}, got {value}.", name)
    return value


def number(
    body: dict[str, Any], name: str, low: float, high: float = math.inf, *, exclude_low: bool = False
) -> float | None:
    value = body.get(name)
    return None if value is None else check_number(value, name, low, high, exclude_low=exclude_low)


def check_number(value: object, name: str, low: float, high: float, *, exclude_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise invalid(f"`{name}` must be a number.", name)
    if not (low < value <= high if exclude_low else low <= value <= high):
        bounds = f"greater than {low:g}" if exclude_low else f"at least {low:g}"
        if high != math.inf:
            bounds += f" and at most {high:g}"
        raise invalid(f"`{name}` must be {bounds}, got {value}.", name)
    return float(value)


def string(body: dict[str, Any], name: str, max_length: int | None = None) -> str | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise invalid(f"`{name}` must be a string.", name)
    if max_length is not None and len(value) > max_length:
        raise invalid(f"`{name}` must have at most {max_length} characters, got {len(value)}.", name)
    return value


def mapping(body: dict[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(f"`{name}` must be an object.", name)
    return value


def objects(body: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(member, dict) for member in value):
        raise invalid(f"`{name}` must be a list of objects.", name)
    return value


def token_ids(body: dict[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    value = body.get(name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise invalid(f"`{name}` must be a list of token ids.", name)
    return tuple(check_token_ids(value, name, vocab_size))


def check_token_ids(values: Sequence[object], name: str, vocab_size: int) -> list[int]:
    """The ids, each of them in the vocabulary."""
    # Whole-list checks: this runs for every prompt that comes as ids. By type, because true is no token id.
    if set(map(type, values)) - {int}:
        raise invalid(f"`{name}` must contain token ids only.", name)
    token_ids: list[int] = list(values)  # type: ignore[arg-type]
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise invalid(f"`{name}`: token id {wrong} is out of vocabulary, which has {vocab_size} tokens.", name)
    return token_ids
