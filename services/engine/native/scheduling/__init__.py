"""Who computes what in the next step. Pure: requests, queues, block tables; no clock, no tensors."""

from services.engine.native.scheduling.batch import Batch, BlockCopy, SampledBatch, SampledSequence, ScheduledSequence
from services.engine.native.scheduling.limits import SchedulerConfig, check_fits
from services.engine.native.scheduling.request import (
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
from services.engine.native.scheduling.scheduler import Scheduler
from services.engine.native.scheduling.stats import SchedulerStats

__all__ = [
    "Batch",
    "BlockCopy",
    "EngineError",
    "FinishReason",
    "InvalidRequest",
    "PositionLogprobs",
    "QueueFull",
    "Request",
    "RequestUpdate",
    "SampledBatch",
    "SampledSequence",
    "SampledToken",
    "SamplingParams",
    "ScheduledSequence",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "TokenLogprob",
    "check_fits",
]
