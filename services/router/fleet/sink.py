"""Declares what a session delivers a request's outputs to."""

from __future__ import annotations

from typing import Protocol

from tandem.v1 import worker_pb2 as pb


class OutputSink(Protocol):
    """Takes a request's outputs. Its methods run in the event loop, and must neither block nor raise."""

    def deliver(self, output: pb.Output) -> None:
        """The first token, log probabilities, or the end: each request has exactly one."""

    def deliver_token(self, token_id: int, is_only: bool) -> None:
        """A further token. `is_only`: of those that come in this moment."""

    def lose(self, reason: str, died: bool) -> None:
        """The end, too: the worker is lost. Nothing else comes. `died`: perhaps of this request."""

    def may_leave(self) -> bool:
        """Whether it could go on at another worker now, since this one drains."""
