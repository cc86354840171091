"""Holds a request as the decode worker knows it, from the router's order to the last output."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from tandem.v1 import worker_pb2 as pb

from kvstore.block import BlockHash
from services.decode.redirecting import Course
from services.decode.session import RouterSession
from services.decode.stages import TRANSITIONS, LiveState
from services.decode.token_lists import TokenLists
from services.engine.api import Request, SamplingParams
from services.lifecycle import Timeline
from services.worker.states import States


@dataclass(eq=False)
class LiveRequest:
    """Owned by the event loop. The engine thread reads `session`, `order`, `request` and `leaves_under`, and marks
    events in `timeline`; `has_token` is its own.
    """

    order: pb.GenerateRequest
    sampling: SamplingParams
    session: RouterSession
    timeline: Timeline
    tpot_s: float = math.inf  # per output token that its client is to get at most
    lists: TokenLists | None = None  # those of tokens that the order lacks, and `sampling` has
    usage: pb.Usage = field(default_factory=pb.Usage)
    admission: asyncio.Task[None] | None = None  # its way into the engine
    timeout: asyncio.TimerHandle | None = None
    request: Request | None = None  # what the engine was given, once it was
    num_attempts: int = 0
    newest_token_s: float | None = None  # when it was sent to the router, by the timeline's clock
    leaves_under: bytes = b""  # LEAVING: the id of the transfer in which it goes to another worker
    said_elsewhere: pb.PrefillFinished | None = None  # with a first token that the engine here samples anew
    hashes: list[BlockHash] = field(default_factory=list)  # of the context's full blocks
    course: Course = field(default_factory=Course)  # of its prompt, from worker to worker
    has_token: bool = False  # said by the engine here, or come with the blocks

    def __post_init__(self) -> None:
        self.prompt_token_ids = tuple(self.order.prompt_token_ids)
        self.resumed_token_ids = tuple(self.order.resumed_token_ids)
        self.usage.num_prompt_tokens = self.num_context_tokens
        self.states = States(f"request {self.order.request_id}", TRANSITIONS, LiveState.ADMITTING)

    @property
    def num_context_tokens(self) -> int:
        """Prompt tokens, and those of the output that another worker has sent already."""
        return len(self.prompt_token_ids) + len(self.resumed_token_ids)

    def left_s(self) -> float:
        """Seconds until its deadline, at least 1 ms; 0: it has none. Whoever works for it has no longer."""
        if self.timeout is None:
            return 0.0
        return max(self.timeout.when() - asyncio.get_running_loop().time(), 0.001)

    def new_attempt(self, clock_s: float) -> Request:
        """A fresh engine request for the next attempt: each has its own id, since a failed one may linger.

        A router that connects again may repeat both its id and its handles while the old session's requests are still
        being withdrawn; the session's number tells them apart.
        """
        self.num_attempts += 1
        return Request(
            request_id=f"{self.order.request_id}/{self.session.number}.{self.order.handle}.{self.num_attempts}",
            prompt_token_ids=self.prompt_token_ids,
            resumed_token_ids=self.resumed_token_ids,
            given_hashes=self.hashes,
            sampling=self.sampling,
            priority=self.order.priority,
            cache_salt=self.order.cache_salt,
            adapter=self.order.adapter,
            arrival_s=clock_s,
            tpot_s=self.tpot_s,
            timeline=self.timeline,
        )
