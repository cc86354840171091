"""Tandem's own engine: computes on C kernels or torch, bit-exact over batches and chunkings.

Implements the port, services.engine.api; a step is schedule, run, postprocess."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from services.engine.native.engine import Engine
    from services.engine.native.runner import Runner

__all__ = ["Engine", "Runner"]


def __getattr__(name: str) -> object:
    """Import the engine, and torch with it, when somebody asks for it: the kernels are tried in a process without."""
    if name == "Engine":
        from services.engine.native.engine import Engine

        return Engine
    if name == "Runner":
        from services.engine.native.runner import Runner

        return Runner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
