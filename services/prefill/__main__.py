"""`python -m services.prefill`: runs one prefill worker process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from services.logs import report_phase
from services.prefill.config import PrefillConfig
from services.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Read the settings, serve until told to stop, and return the exit status."""
    given = load_settings(PrefillConfig, argv, prog="tandem prefill", description="Run one prefill worker.")
    report_phase("importing")
    # Imported after the settings are read: `--help` and a mistyped flag should not wait for torch, nor should a model
    # that cannot be served.
    from services.startup import CANNOT_START
    from services.worker.start import ready_to_start

    config = ready_to_start(given, "prefill")
    if config is None:
        return CANNOT_START
    from services.prefill.service import PrefillService
    from services.worker.process import run_worker

    return run_worker(config, "prefill", lambda parts: PrefillService(config, parts))


if __name__ == "__main__":
    sys.exit(main())
