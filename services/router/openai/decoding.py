"""Decodes bodies into their types. What a body may hold is bounded before memory is taken for it.

A token id takes a few bytes in the body and forty as an object, an empty list takes two and sixty. So values are
counted in the bytes first, which takes half a millisecond for each megabyte.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec
import orjson
from msgspec import Struct

from services.router.errors import ApiError, invalid
from services.router.openai.sizes import Count, count

B = TypeVar("B", bound=Struct)

_WHERE = re.compile(r"(.*?)(?: - at (`key` in )?`\$\.(.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")


def decode(body: bytes | bytearray, kind: type[B], counted: Count | None = None) -> B:
    """The body as the declared type. Raises ApiError 400, which names the field. `counted`: where that was done."""
    if counted is None:
        count(body)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError:
        pass
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"We could not parse the JSON body of your request: {error}") from error
    # Again, for those clients that write 16 as 16.0 or null for nothing, and to show the others their value.
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"We could not parse the JSON body of your request: {error}") from error
    if not isinstance(content, dict):
        raise invalid("The body of the request must be a JSON object.")
    try:
        given = {name: _whole(value) for name, value in content.items() if value is not None}
        return msgspec.convert(given, type=kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), content) from error


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _refusal(text: str, content: dict[str, object]) -> ApiError:
    if missing := _MISSING.fullmatch(text):
        return invalid(f"`{missing[1]}` is required.", missing[1])
    match = _WHERE.fullmatch(text)
    assert match is not None  # it takes any text
    what, is_key, path = match[1].replace(" | null", ""), match[2], match[3] or ""
    name = re.split(r"[.\[]", path)[0]
    where = " has a key that is wrong" if is_key else f" is wrong at `{path}`" if path != name else ""
    value = content.get(name)
    got = f", got {value}" if isinstance(value, int | float) and "got" not in what else ""
    return invalid(f"`{name}`{where}: {what[:1].lower()}{what[1:]}{got}.", name or None)
