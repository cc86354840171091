"""Samples tokens from logits: a pure function of logits, parameters, seed and position."""

from services.engine.native.sampling.sampler import NoToken, SamplingRow, position_logprobs, sample

__all__ = ["NoToken", "SamplingRow", "position_logprobs", "sample"]
