"""`tandem version`: prints what is installed, for bug reports."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

import services
from services.settings import SettingsError, refuse

PACKAGES = (
    "torch",
    "ucxx-cu13",
    "libucx-cu13",
    "nixl-cu13",
    "grpcio",
    "protobuf",
    "redis",
    "fastapi",
    "tokenizers",
    "vllm",
)


def main(argv: Sequence[str]) -> int:
    """Prints one line per package; returns the exit status."""
    if argv:
        refuse("tandem version", SettingsError(f"{argv[0]!r} is one argument too many: there are none"))
    print(f"tandem {services.__version__}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package} {installed_version(package) or 'not installed'}")
    return 0


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, None if it is not there. Does not import it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
