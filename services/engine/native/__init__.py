"""Our own engine: one worker's compute on C kernels or torch, bit-exact over batches and chunkings.

A step is schedule, run, postprocess; one thread calls them."""

from services.engine.config import EngineConfig
from services.engine.native.engine import Engine, EngineLoad, StepOutput
from services.engine.native.memory import Restore
from services.engine.native.scheduling import (
    Batch,
    EngineError,
    FinishReason,
    InvalidRequest,
    PositionLogprobs,
    QueueFull,
    Request,
    RequestUpdate,
    SampledToken,
    SamplingParams,
    TokenLogprob,
)

__all__ = [
    "Batch",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineLoad",
    "FinishReason",
    "InvalidRequest",
    "PositionLogprobs",
    "QueueFull",
    "Request",
    "RequestUpdate",
    "Restore",
    "SampledToken",
    "SamplingParams",
    "StepOutput",
    "TokenLogprob",
]
