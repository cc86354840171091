"""Follows one sequence of a request: which worker has it, what it has said so far, and what became of it.

    state        what it waits for                     its worker is lost, gives it up  the client leaves, a stop string
    DISPATCHING  its first token                       LOST                             ENDED, aborted at its worker
    STREAMING    the next token                        LOST                             the same
    LOST         the index's word, and then a worker   (has none)                       ENDED, the search is cancelled
    RESUMING     the next token, from another worker   LOST                             ENDED, aborted at its worker
    ENDED        nothing                               nothing                          nothing

A deadline of the request ends it as a client that leaves does. It ends in an error where too many workers were lost
with it aboard, and where none came while it was LOST.

What is remembered of a sequence are the ids of its tokens. They travel with the next order (`resumed_token_ids`), and
that worker goes on behind them: the sampler is a function of seed and position, and limits and penalties count them.
What the tokens were made into (text, stop strings, log probabilities, counts) is the choice's, which hears of nothing.

A worker of an older version resumes nothing: it gets the bare order, and the tokens that it says again are passed over.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from tandem.v1 import worker_pb2 as pb

from services.router.fleet.placed import Ask, Placement
from services.router.fleet.session import WorkerSession
from services.router.receipt import Resume
from services.router.routing import holds


class Arrival(NamedTuple):
    """What a sequence has said: tokens, and at its first, its last and with log probabilities the output that they came
    with."""

    sequence_index: int
    token_ids: list[int]
    output: pb.Output | None = None

    def packed(self) -> PackedArrival:
        output = None if self.output is None else self.output.SerializeToString()
        return PackedArrival(self.sequence_index, self.token_ids, output)


class PackedArrival(NamedTuple):
    """One that waits for long. An output is a part of its frame, and keeps all of that: what other sequences said, too;
    with log probabilities it takes five times as much as its bytes, besides."""

    sequence_index: int
    token_ids: list[int]
    output: bytes | None

    def unpacked(self) -> Arrival:
        output = None if self.output is None else pb.Output.FromString(self.output)
        return Arrival(self.sequence_index, self.token_ids, output)


@dataclass(frozen=True)
class ServedBy:
    """The place of a sequence, and how it came there."""

    placement: Placement
    num_attempts: int
    """Decode workers that it was given to."""
    routed_unix_s: float
    """When it was first sent."""
    resumes: tuple[Resume, ...] = ()


@dataclass(frozen=True)
class Budget:
    """How much may go wrong with a sequence before its client hears of it."""

    max_attempts: int
    """Decode workers that are asked in turn, when they refuse."""
    max_worker_deaths: int
    """At this one with it aboard it ends: it may be what kills them."""
    resume_wait_s: float
    """For a worker to come, where there is none."""


class SequenceState(Enum):
    """The states of a sequence that has begun."""

    DISPATCHING = "dispatching"
    STREAMING = "streaming"
    LOST = "lost"
    RESUMING = "resuming"
    ENDED = "ended"


_S = SequenceState
_TRANSITIONS: Mapping[SequenceState, frozenset[SequenceState]] = {
    _S.DISPATCHING: frozenset({_S.STREAMING, _S.LOST, _S.ENDED}),
    _S.STREAMING: frozenset({_S.LOST, _S.ENDED}),
    _S.LOST: frozenset({_S.DISPATCHING, _S.RESUMING, _S.ENDED}),
    _S.RESUMING: frozenset({_S.STREAMING, _S.LOST, _S.ENDED}),
    _S.ENDED: frozenset(),
}


class IllegalTransition(Exception):
    """A sequence was moved between two states that are not connected: a bug of ours."""


class Diverged(Exception):
    """A worker that began afresh said other tokens than the one before."""


@dataclass(eq=False)
class Sequence:
    """One order, where it runs now, and its tokens. `move_to` is the only place that changes the state."""

    ask: Ask
    state: SequenceState = SequenceState.DISPATCHING
    history: list[SequenceState] = field(default_factory=lambda: [SequenceState.DISPATCHING])
    session: WorkerSession | None = None
    handle: int = 0
    placement: Placement | None = None
    awaits_prefill: bool = False
    tried: list[str] = field(default_factory=list)
    """Workers that others are preferred to: the last that was lost, and who gave it up since."""
    num_attempts: int = 0
    """Workers that it was given to."""
    num_losses: int = 0
    """Of these, lost with it aboard: they died, or were left since they did not get on."""
    deaths: list[tuple[WorkerSession, int]] = field(default_factory=list)
    """Of the lost ones those that may have died of it, and how many streams each had had."""
    searched_s: float = 0.0
    """How long it has looked for other workers since its newest token."""
    routed_unix_s: float = 0.0
    due_s: float | None = None
    """When its first token is reckoned to come, by its dispatch's clock; None once it has, or its worker was lost."""
    ends_s: float | None = None
    """When the worker's time for it is over, by the same clock."""
    was_full: bool = False
    """The last worker had no room for the order itself."""
    token_ids: array[int] = field(default_factory=lambda: array("I"))
    """What it has said so far."""
    newest_token_s: float = 0.0
    """When the last of them came, by the same clock."""
    num_repeated: int = 0
    """Of these, how many the present worker has still to say again."""
    usage: pb.Usage | None = None
    """What its first token's worker said of the prompt."""
    move: pb.Move | None = None
    """Where its KV is, after a worker that drains has let it go, until another one has said a token."""
    numerics: str = ""
    """Of the worker that it was begun on, which is the one that has said its first token."""
    made_by: set[str] = field(default_factory=set)
    """The numerics of all others who may have made KV that its tokens rest on."""
    resumes: list[Resume] = field(default_factory=list)

    @property
    def index(self) -> int:
        return self.ask.index

    @property
    def request_id(self) -> str:
        return self.ask.order.request_id

    @property
    def ended(self) -> bool:
        return self.state is SequenceState.ENDED

    @property
    def num_deaths(self) -> int:
        """Workers that died with it aboard: who has answered again since had not."""
        return sum(session.num_streams == num_streams for session, num_streams in self.deaths)

    @property
    def outgrows_its_worker(self) -> bool:
        """Whether it may say more than its worker's context holds."""
        assert self.placement is not None, f"{self.request_id} is nowhere"
        num_left = self.ask.order.sampling.max_tokens - len(self.token_ids)
        return num_left > 0 and not holds(self.placement.decision.decode, self.ask.num_final_tokens)

    def move_to(self, state: SequenceState) -> None:
        """Change the state; raises IllegalTransition, with the history, where the table has no such step."""
        if state not in _TRANSITIONS[self.state]:
            path = " -> ".join(past.name for past in self.history)
            raise IllegalTransition(f"sequence {self.request_id}: {path} -> {state.name} is not a legal transition")
        self.state = state
        self.history.append(state)
        del self.history[:-32]

    def resumed_order(self) -> pb.GenerateRequest:
        """Its order with the tokens so far. The prompt's own log probabilities came with the first of them."""
        order = pb.GenerateRequest()
        order.CopyFrom(self.ask.order)
        order.resumed_token_ids.extend(self.token_ids)
        order.sampling.ClearField("prompt_logprobs")
        if self.move is not None:
            order.move.CopyFrom(self.move)
        return order

    def add_token(self, token_id: int, now_s: float) -> bool:
        """Take a token; False where it was known, since the worker began afresh. Raises Diverged."""
        if self.num_repeated:
            known = self.token_ids[-self.num_repeated]
            if token_id != known:
                place = len(self.token_ids) - self.num_repeated
                raise Diverged(f"token {place} is {token_id} now, and was {known}")
            self.num_repeated -= 1
            return False
        self.token_ids.append(token_id)
        self.newest_token_s = now_s
        if self.state is not SequenceState.STREAMING:
            self.move_to(SequenceState.STREAMING)
            self.searched_s = 0.0
        return True

    def take_output(self, output: pb.Output, now_s: float) -> None:
        """Take an output's tokens, and leave in it what is new."""
        num_known = sum(not self.add_token(token_id, now_s) for token_id in output.token_ids)
        if num_known:
            # The first output's word on the prompt was told before, too.
            del output.token_ids[:num_known], output.logprobs[:num_known], output.prompt_logprobs[:]
        if output.HasField("usage"):
            self._take_usage(output)
        if self.resumes:
            del output.stamps[:]  # they tell of the last worker, not of the request

    def _take_usage(self, output: pb.Output) -> None:
        """Keep what a worker said of its part; what goes on is the first one's word on the prompt."""
        if not self.resumes:
            self.usage = self.usage or pb.Usage()
            self.usage.CopyFrom(output.usage)
            return
        resume = self.resumes[-1]
        if resume.usage is None:
            resume.usage = pb.Usage()
            resume.usage.CopyFrom(output.usage)
        num_recomputes = output.usage.num_recomputes
        output.ClearField("usage")
        if self.usage is not None:
            output.usage.CopyFrom(self.usage)
            output.usage.num_recomputes += num_recomputes

    def note_pause(self, reason: str) -> None:
        """Begin a pause of what the client sees, unless it has seen nothing yet, or no end of the last one."""
        if self.token_ids and not (self.resumes and self.resumes[-1].pause_s is None):
            assert self.placement is not None, f"{self.request_id} has said something nowhere"
            worker_id, space = self.placement.decision.decode.worker_id, self.placement.space
            self.resumes.append(Resume(worker_id, reason, len(self.token_ids), space.block_size, self.newest_token_s))
