"""`python -m services.elastic`: runs one elastic worker process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from services.elastic.config import ElasticConfig
from services.logs import report_phase
from services.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Read the settings, serve until told to stop, and return the exit status."""
    given = load_settings(ElasticConfig, argv, prog="tandem elastic", description="Run one elastic worker.")
    report_phase("importing")
    # Imported after the settings are read: `--help` and a mistyped flag should not wait for torch, nor should a model
    # that cannot be served.
    from services.startup import CANNOT_START
    from services.worker.start import ready_to_start

    config = ready_to_start(given, "elastic")
    if config is None:
        return CANNOT_START
    from services.elastic.service import ElasticService
    from services.worker.process import run_worker

    return run_worker(config, "elastic", lambda parts: ElasticService(config, parts))


if __name__ == "__main__":
    sys.exit(main())
