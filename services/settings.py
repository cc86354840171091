"""Configuration: one frozen dataclass per service, filled from defaults, a file, the environment and flags.

A service declares its settings once, in its `config.py`:

    @dataclass(frozen=True)
    class RouterConfig:
        port: int = setting(8000, help="port of the HTTP API", group="HTTP")
        api_key: tuple[str, ...] = setting((), help="accepted bearer tokens", secret=True)

and its `main(argv)` calls `load_settings(RouterConfig, argv, prog="tandem router", description="…")`. The names derive
from the field: `--max-num-seqs`, `TANDEM_MAX_NUM_SEQS`, and `max-num-seqs` (or `max_num_seqs`) in the file. A setting
that is unknown or malformed stops the process with a message that names it, where it came from, and what is allowed.

One file and one environment may serve a whole deployment: a name that another service of Tandem declares is passed
over, a name that no service declares is refused. Types: str, int, float, bool, `tuple[T, ...]` of these, `T | None`.
Imports are light on purpose: `--help` must answer at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import math
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NoReturn, Protocol, TypeVar

T = TypeVar("T")
ENVIRONMENT_PREFIX = "TANDEM_"
CONFIG_VARIABLE = "TANDEM_CONFIG"
# Variables that are ours and are not settings.
RESERVED_VARIABLES = frozenset({CONFIG_VARIABLE, "TANDEM_LAUNCHER"})
# What Kubernetes puts into every pod for a Service named `tandem` or `tandem-…`. TANDEM_PORT=tcp://… is one of them.
_SERVICE_LINK = re.compile(
    r"TANDEM_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
_SERVICE_LINK_PORT = re.compile(r"(tcp|udp|sctp)://")
# As vLLM and coreutils read them: K is 1024, k and KB are 1000.
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:(?:([kmgt])|([KMGT]))(iB|B)?|B)?")
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")

REQUIRED: typing.Any = dataclasses.MISSING
"""The default of a setting that has none: `model: str = setting(REQUIRED, help="…")` (in a `kw_only` dataclass)."""


class SettingsError(ValueError):
    """A setting is unknown, malformed or contradicts another. `setting` is the field that the message is about."""

    def __init__(self, message: str, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class SettingsClass(Protocol):
    """Any dataclass whose fields are made by `setting`."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[typing.Any]]]


S = TypeVar("S", bound=SettingsClass)


@dataclass(frozen=True)
class _Declaration:
    help: str
    flags: tuple[str, ...]
    choices: tuple[object, ...]
    metavar: str | None
    secret: bool
    group: str


def setting(
    default: T,
    *,
    help: str,
    flags: Sequence[str] | None = None,
    choices: Sequence[T] | None = None,
    metavar: str | None = None,
    secret: bool = False,
    group: str = "settings",
) -> T:
    """Declares one field of a service's settings dataclass.

    `flags` replaces the flag that derives from the field's name (the first one is the main one). A `secret` is printed
    nowhere: not in `repr`, help, error messages or `visible_settings`, and `to_argv` leaves it to `secret_environment`.
    `group` is the heading that `--help` lists the setting under.
    """
    declaration = _Declaration(help, tuple(flags or ()), tuple(choices or ()), metavar, secret, group)
    metadata = {"tandem": declaration}
    if default is REQUIRED:
        return typing.cast(T, dataclasses.field(repr=not secret, metadata=metadata))
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


@dataclass(frozen=True)
class _Setting:
    """One field with everything that derives from its name and its type hint."""

    name: str
    hint: object
    default: object
    declared: _Declaration

    @property
    def flags(self) -> tuple[str, ...]:
        return self.declared.flags or (f"--{self.name.replace('_', '-')}",)

    @property
    def variable(self) -> str:
        return variable_of(self.name)

    @property
    def optional(self) -> bool:
        return type(None) in typing.get_args(self.hint) and not self.repeated

    @property
    def core(self) -> object:
        """The hint without `| None`."""
        if isinstance(self.hint, types.UnionType) or typing.get_origin(self.hint) is typing.Union:
            return next(arg for arg in typing.get_args(self.hint) if arg is not type(None))
        return self.hint

    @property
    def repeated(self) -> bool:
        return typing.get_origin(self.core) is tuple

    @property
    def scalar(self) -> object:
        return typing.get_args(self.core)[0] if self.repeated else self.core

    @property
    def is_quantity(self) -> bool:
        return self.scalar is int and self.name.endswith(("_bytes", "_tokens", "_len"))


@functools.cache
def _settings_of(cls: type[SettingsClass]) -> tuple[_Setting, ...]:
    hints = typing.get_type_hints(cls)
    return tuple(
        _Setting(field.name, hints[field.name], field.default, field.metadata["tandem"])
        for field in dataclasses.fields(cls)
    )


def variable_of(name: str) -> str:
    """The environment variable of the setting `name`."""
    return ENVIRONMENT_PREFIX + name.upper()


@functools.cache
def names_of_all_services() -> frozenset[str]:
    """The settings that any service declares, read from the source of the `config.py` files.

    Not by importing them: the services never import each other, and an image may lack what another service needs.
    """
    names: set[str] = set()
    for path in Path(__file__).parent.glob("*/config.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(node.value, ast.Call)
            ):
                function = node.value.func
                if isinstance(function, ast.Name) and function.id == "setting":
                    names.add(node.target.id)
    return frozenset(names)


# ---- one value ------------------------------------------------------------


def parse_quantity(text: str) -> int:
    """`"4GiB"`, `"4G"` -> 4 * 2**30; `"4GB"`, `"4g"` -> 4 * 10**9; `"0.5K"` -> 512. Raises ValueError."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is not a number with one of the suffixes K, M, G, T, KiB … (1024) or k, KB … (1000)"
        )
    number, small, large, unit = match.groups()
    power = _POWERS[(small or large).lower()] if small or large else 0
    base = 1024 if unit == "iB" or (large and unit is None) else 1000
    if unit == "iB" and small:
        base = 1024
    value = float(number) * base**power if "." in number else int(number) * base**power
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def _parse_scalar(item: _Setting, text: str) -> object:
    """Text from a flag, the environment or a quoted value in the file. Raises ValueError with the reason."""
    text = text.strip() if item.scalar is not str else text
    if item.scalar is str:
        return text
    if item.scalar is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise ValueError(f"{text!r} is neither true nor false")
    if item.scalar is int:
        if item.is_quantity:
            return parse_quantity(text)
        if re.fullmatch(r"[+-]?[0-9]+", text) is None:
            raise ValueError(f"{text!r} is not a whole number")
        return int(text)
    if item.scalar is float:
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a number") from None
        if not math.isfinite(number):
            raise ValueError(f"{text!r} is not a finite number")
        return number
    raise TypeError(f"{item.name}: settings of type {item.hint!r} are not supported")


def _convert_scalar(item: _Setting, value: object) -> object:
    """A typed value from the file. Raises ValueError with the reason."""
    if isinstance(value, str):
        return _parse_scalar(item, value)
    if item.scalar is str:
        raise ValueError(f"{value!r} is not text: put it in quotes")
    if item.scalar is bool and isinstance(value, bool):
        return value
    if not isinstance(value, bool):
        if item.scalar is int and isinstance(value, int):
            return value
        if item.scalar is float and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    wanted = {int: "a whole number", float: "a number", bool: "true or false"}[typing.cast(type, item.scalar)]
    raise ValueError(f"{value!r} is not {wanted}")


def _convert(item: _Setting, value: object, source: str, *, split: bool) -> object:
    """The setting's value from what `source` says. `split`: commas separate the members of a tuple."""
    try:
        if value is None or (item.optional and isinstance(value, str) and value.lower() in ("none", "null")):
            if item.optional:
                return None
            raise ValueError("it needs a value")
        if not item.repeated:
            if isinstance(value, list | dict):
                raise ValueError("it takes one value")
            result = _convert_scalar(item, value)
            members: tuple[object, ...] = (result,)
        else:
            if isinstance(value, str):
                value = [part.strip() for part in value.split(",") if part.strip()] if split else [value]
            elif not isinstance(value, list):
                value = [value]
            result = members = tuple(_convert_scalar(item, member) for member in value)
        for member in members:
            if item.declared.choices and member not in item.declared.choices:
                raise ValueError(f"{member!r} is not one of {_listed(item.declared.choices)}")
    except ValueError as error:
        why = "the value (a secret, not shown) is malformed" if item.declared.secret else str(error)
        raise SettingsError(f"{source}: {why}", item.name) from None
    return result


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


# ---- the sources ----------------------------------------------------------


def read_config_file(path: str) -> dict[str, object]:
    """The mapping in a YAML (`.yaml`, `.yml`) or TOML (`.toml`) file. Raises SettingsError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: {error}") from error
    if path.endswith(".toml"):
        import tomllib

        try:
            content: object = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(f"{path}: {error}") from error
    elif path.endswith((".yaml", ".yml")):
        content = _read_yaml(path, text)
    else:
        raise SettingsError(f"--config {path}: the name must end in .yaml, .yml or .toml")
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"{path}: expected one setting per line, as in `max-num-seqs: 8`")
    return content


def _read_yaml(path: str, text: str) -> object:
    import yaml  # with a --config file only: --help stays quick

    try:
        document = yaml.compose(text, Loader=yaml.SafeLoader)
        if isinstance(document, yaml.MappingNode):
            keys = [key.value for key, _ in document.value]
            for key in keys:
                if keys.count(key) > 1:  # YAML's readers silently take the last
                    raise SettingsError(f"{path}: {key} is there twice")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: {error}") from error


def _from_file(items: Mapping[str, _Setting], path: str) -> dict[str, tuple[object, str]]:
    found: dict[str, tuple[object, str]] = {}
    for key, value in read_config_file(path).items():
        name, source = key.replace("-", "_"), f"{path}: {key}"
        if name in found:
            raise SettingsError(f"{source} is there twice", name)
        if name in items:
            found[name] = (_convert(items[name], value, source, split=False), source)
        elif name not in names_of_all_services():
            raise SettingsError(f"{source} is not a setting{_did_you_mean(name, items, '-')}")
    return found


def _from_environment(items: Mapping[str, _Setting], environ: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    """Empty variables count as not set: that is how compose files and manifests leave one out."""
    found: dict[str, tuple[object, str]] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in RESERVED_VARIABLES or not text:
            continue
        name, source = variable.removeprefix(ENVIRONMENT_PREFIX).lower(), f"environment variable {variable}"
        if variable.endswith("_PORT") and _SERVICE_LINK_PORT.match(text):
            continue
        if name in items and variable == items[name].variable:
            found[name] = (_convert(items[name], text, source, split=True), source)
        elif name not in names_of_all_services() and not _SERVICE_LINK.fullmatch(variable):
            raise SettingsError(f"{source} is not a setting{_did_you_mean(name, items, '_')}")
    return found


def _did_you_mean(name: str, items: Mapping[str, _Setting], separator: str) -> str:
    close = difflib.get_close_matches(name, items, n=1)
    return f"; did you mean {close[0].replace('_', separator)}?" if close else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def make_parser(
    cls: type[SettingsClass], prog: str | None = None, description: str | None = None
) -> argparse.ArgumentParser:
    """The flags of a settings class, grouped. Absent flags leave nothing in the namespace; values stay text."""
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog=settings_epilog(cls),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
    )
    parser.add_argument("--config", metavar="FILE", help=f"YAML or TOML file with settings [{CONFIG_VARIABLE}]")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in _settings_of(cls):
        title = item.declared.group
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        metavar = item.declared.metavar or _metavar(item)
        text = _help_text(item).replace("%", "%%")
        if item.scalar is bool and not item.repeated:
            group.add_argument(*item.flags, dest=item.name, action=argparse.BooleanOptionalAction, help=text)
        elif item.repeated:
            group.add_argument(*item.flags, dest=item.name, nargs="+", action="extend", metavar=metavar, help=text)
        else:
            group.add_argument(*item.flags, dest=item.name, metavar=metavar, help=text)
    return parser


def settings_epilog(cls: type[SettingsClass]) -> str:
    """What stands below the flags in `--help`: where else a setting can come from."""
    name = _settings_of(cls)[0].name
    return (
        f"Every setting can also stand in the --config file ({name.replace('_', '-')}: …) or in the environment\n"
        f"({variable_of(name)}=…). A flag wins over the environment, the environment over the file."
    )


def _metavar(item: _Setting) -> str:
    if item.declared.choices:
        return "{" + ",".join(str(choice) for choice in item.declared.choices) + "}"
    return {int: "SIZE" if item.name.endswith("_bytes") else "N", float: "X"}.get(
        typing.cast(type, item.scalar), item.name.rsplit("_", 1)[-1].upper()
    )


def _help_text(item: _Setting) -> str:
    if item.default is dataclasses.MISSING:
        return f"{item.declared.help} (required)"
    if item.default is None or item.default == () or item.default == "" or item.declared.secret:
        return item.declared.help
    default = {True: "on", False: "off"}[item.default] if isinstance(item.default, bool) else item.default
    return f"{item.declared.help} (default: {_listed(default) if isinstance(default, tuple) else default})"


def _from_flags(
    cls: type[SettingsClass], parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[dict[str, tuple[object, str]], str | None]:
    # vLLM takes --max_num_seqs for --max-num-seqs, and people's scripts have both.
    spelled = [re.sub(r"^--[^=]*", lambda match: match[0].replace("_", "-"), argument) for argument in argv]
    namespace, rest = parser.parse_known_args(spelled)
    items = {item.name: item for item in _settings_of(cls)}
    if rest:
        name = rest[0].lstrip("-").partition("=")[0].replace("-", "_")
        what = "is not a setting" if rest[0].startswith("-") else "is an argument that belongs to no flag"
        raise SettingsError(f"{rest[0].partition('=')[0]} {what}{_did_you_mean(name, items, '-')}")
    given = vars(namespace)
    path = given.pop("config", None)
    found = {}
    for name, value in given.items():
        source = items[name].flags[0]
        found[name] = (_convert(items[name], value, source, split=False), source)
    return found, path


# ---- all together ---------------------------------------------------------


def resolve_settings(
    cls: type[S], argv: Sequence[str], environ: Mapping[str, str], parser: argparse.ArgumentParser | None = None
) -> S:
    """The settings from all sources: default < file < environment < flag. Raises SettingsError."""
    items = {item.name: item for item in _settings_of(cls)}
    flags, path = _from_flags(cls, parser or make_parser(cls), argv)
    path = path or environ.get(CONFIG_VARIABLE) or None
    found = _from_file(items, path) if path else {}
    found |= _from_environment(items, environ) | flags
    for name, item in items.items():
        if item.default is dataclasses.MISSING and name not in found:
            raise SettingsError(f"{item.flags[0]} is required", name)
    try:
        return cls(**{name: value for name, (value, _) in found.items()})
    except SettingsError as error:
        if error.setting in found:
            raise SettingsError(f"{found[error.setting][1]}: {error}", error.setting) from error
        raise


def load_settings(
    cls: type[S],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
    environ: Mapping[str, str] = os.environ,
) -> S:
    """The settings of a process that starts. Prints what is wrong and exits with status 2; --help prints and exits."""
    parser = make_parser(cls, prog, description)
    try:
        return resolve_settings(cls, sys.argv[1:] if argv is None else argv, environ, parser)
    except SettingsError as error:
        print(f"{parser.prog}: error: {error}\nTry '{parser.prog} --help'.", file=sys.stderr)
        raise SystemExit(2) from error


def to_argv(settings: SettingsClass) -> list[str]:
    """Flags that give these settings again, without defaults and secrets (any user can read a process's arguments)."""
    argv: list[str] = []
    for item in _settings_of(type(settings)):
        value, flag = getattr(settings, item.name), item.flags[0]
        if value == item.default or item.declared.secret or value is None or value == ():
            continue
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            argv += [flag, *(str(member) for member in value)]
        else:
            argv.append(f"{flag}={value}")
    return argv


def secret_environment(settings: SettingsClass) -> dict[str, str]:
    """The environment variables that carry the secrets which `to_argv` leaves out."""
    found = {}
    for item in _settings_of(type(settings)):
        value = getattr(settings, item.name)
        if item.declared.secret and value != item.default and value is not None:
            found[item.variable] = ",".join(value) if isinstance(value, tuple) else str(value)
    return found


def visible_settings(settings: SettingsClass) -> dict[str, object]:
    """Name to value, for logs and debug pages; a secret that is set shows as `***`."""
    visible: dict[str, object] = {}
    for item in _settings_of(type(settings)):
        value = getattr(settings, item.name)
        visible[item.name] = "***" if item.declared.secret and value else value
    return visible
