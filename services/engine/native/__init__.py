"""Tandem's own engine: computes on C kernels or torch, bit-exact over batches and chunkings.

Implements the port, services.engine.api; a step is schedule, run, postprocess."""

from services.engine.api import (
    FinishReason,
    InvalidRequest,
    PositionLogprobs,
    QueueFull,
    RequestUpdate,
    SampledToken,
    SamplingParams,
    StepOutput,
    TokenLogprob,
)
from services.engine.config import EngineConfig
from services.engine.native.engine import Engine
from services.engine.native.scheduling import Request

__all__ = [
    "Engine",
    "EngineConfig",
    "FinishReason",
    "InvalidRequest",
    "PositionLogprobs",
    "QueueFull",
    "Request",
    "RequestUpdate",
    "SampledToken",
    "SamplingParams",
    "StepOutput",
    "TokenLogprob",
]
