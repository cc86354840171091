"""Defines a step's Batch, the scheduler's order to the runner, and the runner's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.engine.native.scheduling.request import Request
from services.engine.native.speculation import DraftChunk
from services.engine.prompt_budget import PromptBudget
from services.engine.request import PositionLogprobs, SampledToken
from services.rates import StepShape, num_pairs


class ScheduledSequence(NamedTuple):
    """A run of one request's tokens, from `start` on, to be computed in this step.

    token_ids   |-- computed before --|-- this step --|-- later --|
                0                   start           end       num_tokens

    One that generates may have guesses of what follows its newest token: they are computed with it, behind it.

    token_ids   |-- computed before --| newest |
    this step                         | newest |-- draft --|
                0                   start                 end
    """

    request: Request
    start: int
    num_tokens: int  # guesses included
    is_first: bool  # the request has never been in a step before
    needs_sample: bool  # this step reaches the newest token: sample the one after it
    num_prompt_logprobs: int | None  # alternatives to report for prompt tokens; None: not asked for
    draft: tuple[int, ...] = ()  # guesses, or TO_BE_DRAFTED: sample after each of them, too

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def generates(self) -> bool:
        """Whether it goes on with a stream, from a token that was put out here or handed over."""
        return self.needs_sample and self.num_known == 1 and self.start >= self.request.num_context_tokens

    @property
    def num_known(self) -> int:
        """Tokens of this step that are no guesses."""
        return self.num_tokens - len(self.draft)

    @property
    def token_ids(self) -> list[int]:
        """Those of this step."""
        return [*self.request.token_ids[self.start : self.end], *self.draft]

    @property
    def num_prompt_rows(self) -> int:
        """Number of positions here whose next token stands in the prompt: each gives one prompt logprob."""
        if self.num_prompt_logprobs is None:
            return 0
        return max(0, min(self.end, self.request.num_prompt_tokens - 1) - self.start)


class BlockCopy(NamedTuple):
    """The KV of the first `num_tokens` tokens goes from one block to another; the rest of the other is cleared.

    Not the whole block: what follows in the source belongs to other tokens. Nobody would attend to it, but attention
    multiplies it by zero, and were it not finite, neither would the result be.
    """

    source: int
    destination: int
    num_tokens: int


@dataclass(frozen=True)
class Batch:
    """One step's work. The runner first copies, in order, then zeroes, then computes: a copy's source may be among
    the new blocks, evicted and given out again by this very schedule."""

    sequences: tuple[ScheduledSequence, ...]  # decode rows first, then prefill chunks
    copies: tuple[BlockCopy, ...] = ()
    new_block_ids: tuple[int, ...] = ()  # hold unknown bytes: zeroed before use; no destination of a copy
    held_block_ids: tuple[
        int, ...
    ] = ()  # one reference each until the step has ended: what copies read must stay as it is
    draft_chunks: tuple[DraftChunk, ...] = ()  # what the draft model computes before it guesses, or to guess later

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)

    @property
    def shape(self) -> StepShape:
        """The shape that decides how long the step takes."""
        return shape_of(self.sequences)


def shape_of(sequences: Sequence[ScheduledSequence]) -> StepShape:
    """What a step of these computes. A guess is as much work as a sequence that generates."""
    prompts = [sequence for sequence in sequences if sequence.num_known > 1]
    generating = [range(each.start + 1, each.end + 1) for each in sequences if each.num_known == 1]
    return StepShape(
        num_prompt_tokens=sum(sequence.num_tokens for sequence in prompts),
        num_prompt_pairs=sum(num_pairs(sequence.start, sequence.num_tokens) for sequence in prompts),
        num_running=sum(map(len, generating)),
        num_context_tokens=sum(map(sum, generating)),
    )


class BatchBuilder:
    """A batch while the scheduler puts it together, and what is left of the step's budgets."""

    def __init__(self, num_tokens: int, num_prompt_logprob_rows: int, prompt_budget: PromptBudget) -> None:
        self.budget = num_tokens
        self.prompt_budget = prompt_budget
        self.prompt_logprob_rows = num_prompt_logprob_rows
        self.sequences: list[ScheduledSequence] = []
        self.copies: list[BlockCopy] = []
        self.new_block_ids: list[int] = []
        self.preempted: list[Request] = []
        self.held_block_ids: list[int] = []
        self.draft_chunks: list[DraftChunk] = []

    def room(self, request: Request, start: int) -> int:
        """How many tokens of a prompt the budgets allow that is computed from position `start` on.

        A last token is computed as a stream's: it needs no room beside them.
        """
        if not self.prompt_budget.is_bounded or request.num_tokens - start == 1:
            return self.budget
        return min(self.prompt_budget.room(shape_of(self.sequences), start), self.budget)

    def add_chunk(self, request: Request, room: int) -> bool:
        """Schedule what `room` allows of the request's uncomputed tokens; False if that is nothing."""
        num_tokens = min(request.num_tokens - request.num_computed_tokens, room)
        if request.wants_prompt_logprobs:
            num_tokens = min(num_tokens, self.prompt_logprob_rows)
            self.prompt_logprob_rows -= num_tokens
        if num_tokens > 0:
            self.add(request, num_tokens)
        return num_tokens > 0

    @property
    def carries_prompts(self) -> bool:
        """Whether any of a prompt but a last token is computed."""
        return any(sequence.num_known > 1 for sequence in self.sequences)

    def add(self, request: Request, num_tokens: int) -> None:
        """Schedule the request's next `num_tokens` uncomputed tokens."""
        assert 0 < num_tokens <= self.budget, f"{num_tokens} tokens of {request.request_id}, budget {self.budget}"
        start = request.num_computed_tokens
        self.budget -= num_tokens
        self.sequences.append(
            ScheduledSequence(
                request=request,
                start=start,
                num_tokens=num_tokens,
                is_first=not request.was_scheduled,
                needs_sample=start + num_tokens == request.num_tokens,
                num_prompt_logprobs=request.sampling.prompt_logprobs if request.wants_prompt_logprobs else None,
            )
        )
        request.was_scheduled = True

    def add_draft(self, index: int, draft: tuple[int, ...], new_block_ids: list[int]) -> None:
        """Have the sequence at `index`, which generates, try these guesses, in its own blocks and these new ones."""
        sequence = self.sequences[index]
        assert len(draft) <= self.budget, (
            f"{len(draft)} guesses for {sequence.request.request_id}, budget {self.budget}"
        )
        self.budget -= len(draft)
        self.new_block_ids += new_block_ids
        self.sequences[index] = sequence._replace(num_tokens=1 + len(draft), draft=draft)

    def build(self) -> Batch:
        return Batch(
            sequences=tuple(self.sequences),
            copies=tuple(self.copies),
            new_block_ids=tuple(self.new_block_ids),
            held_block_ids=tuple(self.held_block_ids),
            draft_chunks=tuple(self.draft_chunks),
        )


@dataclass(frozen=True)
class SampledSequence:
    """The runner's answer for one sequence of the batch.

    `tokens` are those that came true of its draft, and the one after them. None where the batch asked for no sample,
    and where none could be had: then `failure` says why.
    """

    tokens: tuple[SampledToken, ...] = ()
    failure: str | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()  # for the tokens at start + 1, start + 2, ...


@dataclass(frozen=True)
class SampledBatch:
    """One answer per sequence, in the batch's order."""

    sequences: tuple[SampledSequence, ...]
