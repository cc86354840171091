"""Loads settings: one frozen dataclass per service, from defaults, a file, the environment and flags.

Imports are light on purpose: `--help` must answer at once.
"""

from services.settings.declare import (
    ENVIRONMENT_PREFIX,
    Setting,
    Settings,
    SettingsError,
    setting,
    settings_of,
)
from services.settings.engine_args import block_meaning, draws_weights, engine_arguments, tensor_parallel_size
from services.settings.flags import make_parser
from services.settings.load import (
    argv_of,
    build_settings,
    collect_settings,
    load_settings,
    refuse,
    secret_environment,
)
from services.settings.sources import Given

__all__ = [
    "ENVIRONMENT_PREFIX",
    "Given",
    "Setting",
    "Settings",
    "SettingsError",
    "argv_of",
    "block_meaning",
    "build_settings",
    "collect_settings",
    "draws_weights",
    "engine_arguments",
    "load_settings",
    "make_parser",
    "refuse",
    "secret_environment",
    "setting",
    "settings_of",
    "tensor_parallel_size",
]
