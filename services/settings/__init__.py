"""Loads settings: one frozen dataclass per service, from defaults, a file, the environment and flags.

A service declares its settings once, in its `config.py`:

    @dataclass(frozen=True)
    class RouterConfig(Settings):
        port: int = setting(8000, min=0, max=65535, help="port of the HTTP API", group="HTTP")
        api_key: tuple[str, ...] = setting((), help="accepted bearer tokens", secret=True)

and its `main(argv)` calls `load_settings(RouterConfig, argv, prog="tandem router", description="…")`. The names derive
from the field: `--max-num-seqs`, `TANDEM_MAX_NUM_SEQS`, and `max-num-seqs` (or `max_num_seqs`) in the file. A setting
that is unknown or malformed stops the process with a message that names it, where it came from, and what is allowed.

One file and one environment may serve a whole deployment: a name that another service of Tandem declares is passed
over, a name that no service declares is refused. Types: str, int, float, bool, `tuple[T, ...]` of these, `T | None`.
Imports are light on purpose: `--help` must answer at once.
"""

from services.settings.declare import (
    ENVIRONMENT_PREFIX,
    REQUIRED,
    Setting,
    Settings,
    SettingsError,
    setting,
    settings_of,
    variable_of,
)
from services.settings.flags import make_parser
from services.settings.load import (
    argv_of,
    build_settings,
    collect_settings,
    load_settings,
    refuse,
    resolve_settings,
    secret_environment,
)
from services.settings.sources import Given
from services.settings.values import parse_quantity

__all__ = [
    "ENVIRONMENT_PREFIX",
    "REQUIRED",
    "Given",
    "Setting",
    "Settings",
    "SettingsError",
    "argv_of",
    "build_settings",
    "collect_settings",
    "load_settings",
    "make_parser",
    "parse_quantity",
    "refuse",
    "resolve_settings",
    "secret_environment",
    "setting",
    "settings_of",
    "variable_of",
]
