"""`python -m services.store` (or `python -m kvstore`, or `tandem store`): runs one store node."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from services.logs import report_phase
from services.settings import load_settings
from services.store.config import StoreConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Read the settings, serve until told to stop, and return the exit status."""
    config = load_settings(
        StoreConfig,
        argv,
        prog="tandem store",
        description="Run one store node: it keeps KV blocks in memory and on disk, and lends them to workers.",
    )
    report_phase("importing")
    # Imported after the settings are read: `--help` and a mistyped flag should not wait for UCX.
    from services.store.process import run_store

    return run_store(config)


if __name__ == "__main__":
    sys.exit(main())
