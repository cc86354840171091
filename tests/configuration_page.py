"""docs/configuration.md, made of the settings in the code: `python -m tests.configuration_page` writes it."""

from __future__ import annotations

from pathlib import Path

from services.cli.config import PlanConfig, SizeConfig, UpConfig
from services.decode.config import DecodeConfig
from services.elastic.config import ElasticConfig
from services.prefill.config import PrefillConfig
from services.router.config import RouterConfig
from services.settings.declare import Setting, SettingsClass, settings_of
from services.store.config import StoreConfig
from services.worker.config import WorkerConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
_HEAD = """# Configuration

Every setting is a flag, a variable and a key of the `--config` file (YAML or TOML, also named by `TANDEM_CONFIG`):
`--max-num-seqs` (or `--max_num_seqs`), `TANDEM_MAX_NUM_SEQS`, `max-num-seqs`. Default < file < environment < flag.
Anything unknown or malformed stops the process with status 2 and a message that names the setting, where the value
came from and what is allowed.

One file and one environment may serve a whole deployment: a name that another service declares is passed over, a name
that no service declares is refused. `tandem up` takes the flags of the router, the workers and the store nodes beside
its own. A switch `--x` has a `--no-x`. Settings named `…-bytes`, `…-tokens` and `…-len` understand 4GiB, 4G (both
1024-based), 4GB, 4g and 32k (1000-based). Settings that may be given several times take a list in the file and commas
in the variable. Flags have vLLM's names where they mean what vLLM means. Secrets (*) appear in no log, no help, no
error and no process's arguments. [operations.md](operations.md) says which of them to tune.

This page is made of the code by `python -m tests.configuration_page`; a test compares them.
"""


def page() -> str:
    """The whole text."""
    common = {setting.name for setting in settings_of(WorkerConfig)}
    halves = {setting.name for half in (PrefillConfig, DecodeConfig) for setting in settings_of(half)}
    parts = [
        ("Router", "`tandem router`", settings_of(RouterConfig)),
        ("Workers", "`tandem prefill` and `tandem decode`", settings_of(WorkerConfig)),
        ("Prefill workers", "in addition", _without(PrefillConfig, common)),
        ("Decode workers", "in addition", _without(DecodeConfig, common)),
        ("Elastic workers", "`tandem elastic`: both, and in addition", _without(ElasticConfig, common | halves)),
        ("Store nodes", "`tandem store`", settings_of(StoreConfig)),
        ("Launcher", "`tandem up`", settings_of(UpConfig)),
        ("Sizing", "`tandem size`", settings_of(SizeConfig)),
        ("Planning", "`tandem plan TRACE`", settings_of(PlanConfig)),
    ]
    return "\n".join([_HEAD, *(_section(title, whose, settings) for title, whose, settings in parts)])


def _without(cls: type[SettingsClass], names: set[str]) -> tuple[Setting, ...]:
    return tuple(setting for setting in settings_of(cls) if setting.name not in names)


def _section(title: str, whose: str, settings: tuple[Setting, ...]) -> str:
    rows = [f"| {_flags(setting)} | {_default(setting)} | {_help(setting)} |" for setting in settings]
    return "\n".join(
        [f"## {title}", "", f"{whose}.", "", "| flag | default | what it does |", "|---|---|---|", *rows, ""]
    )


def _flags(setting: Setting) -> str:
    return ", ".join(f"`{flag}`" for flag in setting.flags) + (" *" if setting.secret else "")


def _default(setting: Setting) -> str:
    value = setting.default
    if value in ("", (), None):
        return ""
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _help(setting: Setting) -> str:
    text = setting.help.replace("|", "\\|")
    if setting.choices:
        text += f" ({', '.join(map(str, setting.choices))})"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
