"""Tandem's own engine: computes on C kernels or torch, bit-exact over batches and chunkings.

Implements the port, services.engine.api; a step is schedule, run, postprocess."""

from services.engine.native.engine import Engine

__all__ = ["Engine"]
