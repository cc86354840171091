"""Declares a setting: a dataclass field, and the names that derive from it.

A service declares its settings once, in its `config.py`:

    @dataclass(frozen=True)
    class RouterConfig(Settings):
        port: int = setting(8000, min=0, max=65535, help="port of the HTTP API", group="HTTP")
        api_key: tuple[str, ...] = setting((), help="accepted bearer tokens", secret=True)

and its `main(argv)` calls `load_settings(RouterConfig, argv, prog="tandem router", description="…")`. The names derive
from the field: `--max-num-seqs`, `TANDEM_MAX_NUM_SEQS`, and `max-num-seqs` (or `max_num_seqs`) in the file. An unknown
or malformed setting stops the process with a message: its name, where it came from, and what is allowed. A name that
another service declares is passed over, so one file and one environment may serve a whole deployment.
Types: str, int, float, bool, `tuple[T, ...]` of these, `T | None`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

T = TypeVar("T")
ENVIRONMENT_PREFIX = "TANDEM_"


class SettingsError(ValueError):
    """A setting is unknown, malformed or contradicts another.

    A config class raises it from `__post_init__`; with `setting`, the name of the field that the message is about, the
    message that the user sees begins with the place that the value came from.
    """

    def __init__(self, message: str, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


@dataclass(frozen=True)
class Range:
    """The range of a number: `above` is an exclusive lower bound, `min` and `max` are inclusive, none is infinite."""

    min: float | None = None
    above: float | None = None
    max: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.min is None or value >= self.min)
            and (self.above is None or value > self.above)
            and value <= (math.inf if self.max is None else self.max)
            and value != math.inf
        )

    def __str__(self) -> str:
        if self.max is None and self.above is not None:
            return "be positive" if self.above == 0 else f"be above {self.above:g}"
        if self.max is None:
            return "not be negative" if self.min == 0 else f"be at least {self.min:g}"
        if self.above is not None:
            return f"be above {self.above:g} and at most {self.max:g}"
        return f"be at most {self.max:g}" if self.min is None else f"be from {self.min:g} to {self.max:g}"


class Settings:
    """Base of the settings classes: a value out of its setting's range is refused, wherever it comes from.

    A class that also checks products of its settings does so in a `__post_init__` of its own, after this one.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(typing.cast(typing.Any, self)):
            range_, value = field.metadata["range"], getattr(self, field.name)
            if range_ is not None and value is not None and value not in range_:
                raise SettingsError(f"must {range_}, got {value}", field.name)


class SettingsClass(Protocol):
    """Any dataclass whose fields are made by `setting`."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[typing.Any]]]


def setting(
    default: T,
    *,
    help: str,
    min: float | None = None,
    above: float | None = None,
    max: float | None = None,
    flags: Sequence[str] | None = None,
    choices: Sequence[T] | None = None,
    secret: bool = False,
    group: str = "settings",
) -> T:
    """Declares one field of a service's settings dataclass.

    `min`, `above` (exclusive) and `max` bound a number; a class that derives from `Settings` checks them.
    `flags` replaces the flag that derives from the field's name (the first one is the main one). A `secret` is printed
    nowhere: not in `repr`, help or error messages, and `argv_of` leaves it to `secret_environment`.
    `group` is the heading that `--help` lists the setting under.
    """
    declared = {
        "help": help,
        "flags": tuple(flags or ()),
        "choices": tuple(choices or ()),
        "secret": secret,
        "group": group,
        "range": None if (min, above, max) == (None, None, None) else Range(min, above, max),
    }
    return dataclasses.field(default=default, repr=not secret, metadata=declared)


@dataclass(frozen=True)
class Setting:
    """One field of a settings class, with everything that derives from its name and its type."""

    name: str
    hint: object
    default: object
    help: str
    flags: tuple[str, ...]
    choices: tuple[object, ...]
    secret: bool
    group: str
    range: Range | None

    @property
    def flag(self) -> str:
        return self.flags[0]

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def optional(self) -> bool:
        """Whether the type allows None."""
        return self._is_union and type(None) in typing.get_args(self.hint)

    @property
    def repeated(self) -> bool:
        """Whether the value is a tuple."""
        return typing.get_origin(self._core) is tuple

    @property
    def scalar(self) -> type:
        """The type of the value, or of each of its members: str, int, float or bool."""
        scalar = typing.get_args(self._core)[0] if self.repeated else self._core
        if scalar not in (str, int, float, bool):
            raise TypeError(f"{self.name}: settings of type {self.hint!r} are not supported")
        return typing.cast(type, scalar)

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value: `--x` and `--no-x`."""
        return self.scalar is bool and not self.repeated

    @property
    def is_quantity(self) -> bool:
        """Whether numbers such as 4GiB and 32k are understood."""
        return self.scalar is int and self.name.endswith(("_bytes", "_tokens", "_len"))

    @property
    def _is_union(self) -> bool:
        return isinstance(self.hint, types.UnionType) or typing.get_origin(self.hint) is typing.Union

    @property
    def _core(self) -> object:
        """The type without `| None`."""
        if self._is_union:
            return next(arg for arg in typing.get_args(self.hint) if arg is not type(None))
        return self.hint


def settings_of(cls: type[SettingsClass]) -> tuple[Setting, ...]:
    """The settings that a class declares, in its order."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        declared = dict(field.metadata)
        declared["flags"] = declared["flags"] or (f"--{field.name.replace('_', '-')}",)
        found.append(Setting(field.name, hints[field.name], field.default, **declared))
    return tuple(found)


@functools.cache
def names_of_all_services() -> frozenset[str]:
    """The settings that any service declares, read from the source of the `services/**/config.py` files, and of the
    `services/*_settings.py` files that several share.

    Not by importing them: the services never import each other, and an image may lack what another service needs.
    """
    names: set[str] = set()
    services = Path(__file__).parents[1]
    for path in (*services.glob("**/config.py"), *services.glob("*_settings.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_setting(node.value):
                names.add(node.target.id)
    return frozenset(names)


def _is_setting(node: ast.expr | None) -> bool:
    """`setting(...)`, or a declaration that services share: a call of a module's function, `node_settings.host()`."""
    if not isinstance(node, ast.Call):
        return False
    return isinstance(node.func, ast.Attribute) or (isinstance(node.func, ast.Name) and node.func.id == "setting")


def closest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` is probably a misspelling of."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)
