"""Samples tokens from logits: a pure function of logits, parameters, seed and position."""

from services.engine.native.sampling.batch_sampler import Sampler
from services.engine.native.sampling.row import NoToken, SamplingRow
from services.engine.native.sampling.sampler import position_logprobs, sample

__all__ = ["NoToken", "Sampler", "SamplingRow", "position_logprobs", "sample"]
