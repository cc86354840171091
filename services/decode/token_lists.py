"""Holds the lists of tokens that several orders of a router have in common, on the wire and in memory."""

from __future__ import annotations

import functools

from tandem.v1 import worker_pb2 as pb

from services.engine.api import SamplingParams


class TokenLists:
    """One request's, as its router has sent them once. Those of its sequences that run here hold it."""

    def __init__(self, message: pb.SamplingParams) -> None:
        self._message = message

    def whole(self, sampling: pb.SamplingParams) -> pb.SamplingParams:
        """An order's sampling with these, for a worker that does not have them."""
        whole = pb.SamplingParams()
        whole.CopyFrom(sampling)
        whole.MergeFrom(self._message)
        return whole

    def params(self, sampling: SamplingParams) -> SamplingParams:
        """The engine's parameters with these, which all have in common. Raises InvalidRequest."""
        return sampling.with_lists_of(self._checked)

    @functools.cached_property
    def _checked(self) -> SamplingParams:
        return SamplingParams(
            logit_bias=dict(self._message.logit_bias),
            allowed_token_ids=tuple(self._message.allowed_token_ids),
            stop_token_ids=tuple(self._message.stop_token_ids),
        )
