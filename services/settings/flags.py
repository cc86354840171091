"""Makes the command line of a settings class: its parser, its help, and the settings that flags give."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NoReturn

from services.settings.declare import Setting, SettingsClass, SettingsError, closest, settings_of
from services.settings.sources import CONFIG_VARIABLE, Given
from services.settings.values import convert, listed
from services.settings.vllm_flags import FOREIGN, Foreign, is_foreign, refusal

_FOREIGN = "flags of vLLM"


class _Parser(argparse.ArgumentParser):
    positional: str = ""
    """The setting that an argument without a flag gives; empty for none."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message.removeprefix("argument "))


def make_parser(
    settings: type[SettingsClass] | Sequence[Setting],
    prog: str | None = None,
    description: str | None = None,
    positional: str = "",
) -> argparse.ArgumentParser:
    """A parser for these settings, in groups. It keeps values as text, and leaves out what is not given.

    `positional` names the setting that may also be given without its flag.
    """
    items = settings_of(settings) if isinstance(settings, type) else settings
    parser = _Parser(
        prog=prog,
        description=textwrap.fill(description, 100) if description else None,
        usage=f"%(prog)s [{positional.upper()}] [flags]" if positional else "%(prog)s [flags]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog=_epilog(items[0]),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34),
    )
    parser.positional = positional
    parser.add_argument("--config", metavar="FILE", help=f"YAML or TOML file with settings [{CONFIG_VARIABLE}]")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in items:
        title = item.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_flag(groups[title], item)
    _add_vllm_flags(parser, {flag for item in items for flag in item.flags})
    return parser


class _Collected(argparse.Action):
    """A flag of vLLM's: whether it is taken, passed on or refused is known when the engine is."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        flag, words = option_string or "", tuple(map(str, values or ()))
        vars(namespace).setdefault(_FOREIGN, []).append(Foreign(flag, words, flag))


def _add_vllm_flags(parser: argparse.ArgumentParser, ours: Set[str]) -> None:
    for flag, num_values in FOREIGN.items():
        if flag not in ours:
            parser.add_argument(flag, action=_Collected, dest=_FOREIGN, nargs=num_values, help=argparse.SUPPRESS)


def _add_flag(group: argparse._ArgumentGroup, item: Setting) -> None:
    text = _help(item).replace("%", "%%")
    if item.is_switch:
        group.add_argument(*item.flags, dest=item.name, action=argparse.BooleanOptionalAction, help=text)
    elif item.repeated:
        group.add_argument(*item.flags, dest=item.name, nargs="+", action="extend", metavar=_metavar(item), help=text)
    else:
        group.add_argument(*item.flags, dest=item.name, metavar=_metavar(item), help=text)


def _epilog(example: Setting) -> str:
    return (
        f"Each setting may also stand in the --config file ({example.name.replace('_', '-')}: …) or the environment\n"
        f"({example.variable}=…). A flag wins over the environment, the environment over the file."
    )


def _metavar(item: Setting) -> str:
    if item.choices:
        return "{" + ",".join(str(choice) for choice in item.choices) + "}"
    if item.scalar is int:
        return "SIZE" if item.name.endswith("_bytes") else "N"
    return "X" if item.scalar is float else item.name.rsplit("_", 1)[-1].upper()


def _help(item: Setting) -> str:
    if item.default in (None, (), "") or item.secret:
        return item.help
    if isinstance(item.default, bool):
        return f"{item.help} (default: {'on' if item.default else 'off'})"
    if isinstance(item.default, float):
        return f"{item.help} (default: {item.default:g})"
    default = listed(item.default) if isinstance(item.default, tuple) else item.default
    return f"{item.help} (default: {default})"


def from_flags(
    items: Mapping[str, Setting], parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[dict[str, Given], list[Foreign], str | None]:
    """The settings that the flags give, the flags of vLLM's among them, and the --config file. Raises SettingsError."""
    # vLLM takes --max_num_seqs for --max-num-seqs, and people's scripts have both.
    spelled = [re.sub(r"^--[^=\s]*", lambda match: match[0].replace("_", "-"), argument) for argument in argv]
    namespace, rest = parser.parse_known_args(list(_with_their_flags(spelled)))
    given = vars(namespace)
    positional = parser.positional if isinstance(parser, _Parser) else ""
    if positional and rest and not rest[0].startswith("-"):
        if given.setdefault(positional, rest[0]) != rest[0]:
            raise SettingsError(f"{items[positional].flag} {given[positional]}, and {rest[0]!r} beside it: which?")
        rest = rest[1:]
    if rest:
        raise SettingsError(_unknown(rest[0], items))
    path, foreign = given.pop("config", None), given.pop(_FOREIGN, [])
    settings = {
        name: Given(convert(items[name], value, items[name].flag), items[name].flag) for name, value in given.items()
    }
    return settings, foreign, path


def _with_their_flags(argv: Sequence[str]) -> Iterator[str]:
    """The arguments, each --engine-args one with its value, which argparse would else take for flags of ours."""
    rest = iter(argv)
    for argument in rest:
        value = next(rest, None) if argument == "--engine-args" else None
        yield argument if value is None else f"{argument}={value}"


def _unknown(argument: str, items: Mapping[str, Setting]) -> str:
    if not argument.startswith("-"):
        return f"{argument!r} belongs to no flag"
    flag = argument.partition("=")[0]
    if is_foreign(flag):  # in a spelling that the parser does not have, as --x.y
        return refusal(flag)
    near = closest(flag.lstrip("-").replace("-", "_"), items)
    return f"{flag} is not a setting" + (f"; did you mean {items[near].flag}?" if near else "")
