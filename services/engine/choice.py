"""Opens the engine that the settings name. The one place that knows all engines."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.block import ProofKey
from services.engine.api import Engine
from services.engine.config import EngineConfig


def open_engine(config: EngineConfig, proof_key: ProofKey, progress: Callable[[float], None] | None = None) -> Engine:
    """Load the model and take the memory; `progress` is called with 0..1. Raises `ModelError` or `SettingsError`."""
    # Here and not above: torch comes with either, and settings are read without.
    if config.engine == "paced":
        from services.engine.paced import open_paced

        return open_paced(config, proof_key)
    from services.engine import native

    return native.Engine.from_config(config, progress=progress, proof_key=proof_key)
