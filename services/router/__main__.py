"""`python -m services.router`, `tandem router`: builds the parts, serves until SIGTERM or SIGINT, drains, exits."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from services.logs import report_phase
from services.router.config import RouterConfig
from services.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a router; returns the exit status."""
    config = load_settings(
        RouterConfig, argv, prog="tandem router", description="Serve OpenAI's HTTP API in front of the workers."
    )
    report_phase("importing")
    if config.router_workers > 1:
        from services.router.processes import run_processes

        return run_processes(config)
    # Only now what takes long to import: --help and a wrong flag answer at once.
    from services.router.process import run_router

    return run_router(config)


if __name__ == "__main__":
    sys.exit(main())
