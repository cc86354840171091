"""Parses what a flag, a variable or a file says into the value of a setting."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from services.settings.declare import Setting, SettingsError

# As vLLM and coreutils read them: K is 1024, k and KB are 1000.
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtT]?)(iB|B)?")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_WANTED = {int: "a whole number", float: "a number", bool: "true or false"}


def parse_quantity(text: str) -> int:
    """`"4GiB"`, `"4G"` -> 4 * 2**30; `"4GB"`, `"4g"` -> 4 * 10**9; `"0.5K"` -> 512. Raises ValueError."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not a size: give a number, with K, M, G, T or KiB … (1024) or k, m … or KB … (1000)"
        )
    number, letter, unit = match.groups()
    base = 1024 if unit == "iB" or (unit is None and letter.isupper()) else 1000
    value = (
        float(number) * base ** _POWERS[letter.lower()]
        if "." in number
        else int(number) * base ** _POWERS[letter.lower()]
    )
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def convert(item: Setting, value: object, source: str, *, split_commas: bool = False) -> object:
    """The setting's value from what `source` says: text from a flag or a variable, anything from a file.

    Raises SettingsError, whose message begins with `source` and never shows a secret.
    """
    try:
        return _convert(item, value, split_commas)
    except ValueError as error:
        why = "the value (a secret, so not shown) is malformed" if item.secret else str(error)
        raise SettingsError(f"{source}: {why}", item.name) from None


def listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


def _convert(item: Setting, value: object, split_commas: bool) -> object:
    if value is None or (item.optional and isinstance(value, str) and value.lower() in ("none", "null")):
        if item.optional:
            return None
        raise ValueError("it needs a value")
    if item.repeated:
        if isinstance(value, str) and split_commas:
            value = [part.strip() for part in value.split(",") if part.strip()]
            if not value:
                raise ValueError("it names nothing; leave it empty, or out, for none")
        members = value if isinstance(value, list) else [value]
        return tuple(_convert_scalar(item, member) for member in members)
    if isinstance(value, list | dict):
        raise ValueError("it takes one value")
    return _convert_scalar(item, value)


def _convert_scalar(item: Setting, value: object) -> object:
    result = _parse(item, value) if isinstance(value, str) else _check(item, value)
    if item.choices and result not in item.choices:
        raise ValueError(f"{result!r} is not one of {listed(item.choices)}")
    return result


def _parse(item: Setting, text: str) -> object:
    if item.scalar is str:
        return text
    text = text.strip()
    if item.scalar is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
    elif item.is_quantity:
        return parse_quantity(text)
    elif item.scalar is int:
        if re.fullmatch(r"[+-]?[0-9]+", text):
            return int(text)
    elif re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        return float(text)
    raise ValueError(f"{text!r} is not {_WANTED[item.scalar]}")


def _check(item: Setting, value: object) -> object:
    """A value that the file's syntax has typed already. A whole number will do for a float; nothing else is bent."""
    if item.scalar is str:
        raise ValueError(f"{value!r} is not text: put it in quotes")
    if item.scalar is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if type(value) is item.scalar and item.scalar is not float:
        return value
    raise ValueError(f"{value!r} is not {_WANTED[item.scalar]}")
