"""Decides who computes what in the next step. Pure: requests, queues, block tables; no clock, no tensors."""

from services.engine.native.scheduling.batch import (
    Batch,
    BlockCopy,
    SampledBatch,
    SampledSequence,
    ScheduledSequence,
    shape_of,
)
from services.engine.native.scheduling.limits import SchedulerConfig
from services.engine.native.scheduling.request import Request
from services.engine.native.scheduling.scheduler import Scheduler

__all__ = [
    "Batch",
    "BlockCopy",
    "Request",
    "SampledBatch",
    "SampledSequence",
    "ScheduledSequence",
    "Scheduler",
    "SchedulerConfig",
    "shape_of",
]
