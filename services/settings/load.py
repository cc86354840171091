"""Loads one settings object from all sources, and turns it back into the flags that give it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeVar

from services.settings.declare import Setting, SettingsClass, SettingsError, settings_of
from services.settings.engine_args import engine_flag
from services.settings.flags import from_flags, make_parser
from services.settings.sources import CONFIG_VARIABLE, Given, from_environment, from_file
from services.settings.vllm_flags import Foreign, goes_through, judge

S = TypeVar("S", bound=SettingsClass)
_ENGINE_ARGS = "engine_args"
"""The setting that flags of vLLM's engine are put into, where they stand by themselves."""


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
        refuse(parser.prog, error)


def refuse(prog: str, error: Exception) -> NoReturn:
    """Ends the process with status 2 and the message of an error that its operator can mend."""
    print(f"{prog}: error: {error}", file=sys.stderr)
    if isinstance(error, SettingsError):
        print(f"Try '{prog} --help'.", file=sys.stderr)
    raise SystemExit(2) from error


def resolve_settings(
    cls: type[S], argv: Sequence[str], environ: Mapping[str, str], parser: argparse.ArgumentParser | None = None
) -> S:
    """The settings from all sources: default < file < environment < flag. Raises SettingsError."""
    items = settings_of(cls)
    return build_settings(cls, collect_settings(items, argv, environ, parser or make_parser(cls)))


def collect_settings(
    items: Sequence[Setting], argv: Sequence[str], environ: Mapping[str, str], parser: argparse.ArgumentParser
) -> dict[str, Given]:
    """Collects what was given, by whatever source; defaults are left out. Raises SettingsError."""
    by_name = {item.name: item for item in items}
    flags, foreign, path = from_flags(by_name, parser, argv)
    path = path or environ.get(CONFIG_VARIABLE) or None
    found, in_file = from_file(by_name, path) if path else ({}, [])
    found |= from_environment(by_name, environ) | flags
    if _ENGINE_ARGS in by_name:
        return _with_foreign(found, [*in_file, *foreign], str(by_name["engine"].default))
    # A file may be for several services: what goes through to the workers' engine is not this one's.
    for each in (*(each for each in in_file if not goes_through(each.flag)), *foreign):
        judge(each)
    return found


def _with_foreign(found: dict[str, Given], foreign: Sequence[Foreign], default: str) -> dict[str, Given]:
    """What was given, with the flags of vLLM's among the engine's arguments, if it may be vLLM's. Raises SettingsError.

    Else those that change nothing are noted. Whether vLLM's engine takes one, the settings class asks.
    """
    engine = found["engine"].value if "engine" in found else default
    words = []
    for each in foreign:
        if engine in ("vllm", "auto") and engine_flag(each.flag) is not None:
            words += [each.flag, *each.values]
        else:
            judge(each)
    if not words:
        return found
    before = f"{found[_ENGINE_ARGS].value} " if _ENGINE_ARGS in found else ""
    return found | {_ENGINE_ARGS: Given(before + shlex.join(words), "flags of vLLM")}


def build_settings(cls: type[S], given: Mapping[str, Given]) -> S:
    """The settings object; names that are not the class's are passed over. Raises SettingsError."""
    items = settings_of(cls)
    try:
        return cls(**{item.name: given[item.name].value for item in items if item.name in given})
    except SettingsError as error:
        if error.setting is not None and error.setting in given:
            raise SettingsError(f"{given[error.setting].source}: {error}", error.setting) from error
        raise


def argv_of(items: Sequence[Setting], values: Mapping[str, object]) -> list[str]:
    """Flags that give `values` (name to value).

    Secrets are passed over, since any user can read a process's arguments, and so are names that are not among `items`.
    """
    argv: list[str] = []
    for item in items:
        value = values.get(item.name)
        if item.secret or value is None or value == ():
            continue
        if isinstance(value, bool) and item.is_switch:
            argv.append(item.flag if value else item.flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            argv += [item.flag, *(str(member) for member in value)]
        else:
            argv.append(f"{item.flag}={value}")
    return argv


def secret_environment(items: Sequence[Setting], values: Mapping[str, object]) -> dict[str, str]:
    """The environment variables that carry the secrets which `argv_of` leaves out."""
    found = {}
    for item in items:
        value = values.get(item.name)
        if item.secret and value:
            found[item.variable] = ",".join(value) if isinstance(value, tuple) else str(value)
    return found
