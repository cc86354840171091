"""Decides for whom a small model guesses, and when it computes what it lacks of their texts. Pure: seconds are told.

The draft model keeps keys and values of its own for the blocks of a sequence, by the same table. They begin with
nothing (after a handoff, a resume, a preemption) and are computed chunk by chunk beside the steps:

    token_ids   |-- in the draft model's KV --|------- behind --------| newest |
                0                       num_computed                        num_tokens
    catch up                                  |-- chunk --|
    guess                                     |-- few: with the first pass ----| guess | guess | ..

Both must pay. A guess pays where it raises the tokens a second (`lengths.py`), the draft model's passes counted. To
catch up pays once the sequence has said as many tokens as would win back what it takes, and may say as many more: who
has said n tokens is expected to say n again, so a short answer costs nothing and a long one begins late by a part of
what it wins. Whether guesses come true may change, and is known only of those tried: where none pays, a hundredth of
the time goes into trying one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from services.engine.native.speculation.lengths import Acceptance, Row, choose_lengths, guess_s
from services.engine.native.speculation.speculation import TO_BE_DRAFTED, Candidate, DraftChunk, Guesses, Plan
from services.rates import RateLearner, StepShape

# Tokens that the first pass of a guess computes with the newest one, for next to nothing.
_AT_HAND: Final = 8
# Of a step's time, what may be added to it to catch up: beside other streams, and where one is alone.
_SHARE_BESIDE_OTHERS: Final = 0.25
_SHARE_ALONE: Final = 1.0
_MIN_CHUNK: Final = 16
# Of all time, what goes into trials, and how much of it may be saved up.
_TRIALS: Final = 0.01
_MAX_TRIALS_S: Final = 1.0
# A trial is worth making where a guess would pay if it came true so often.
_HOPED: Final = 0.8
# What requests before taught a new one begins with, an average over fifty guesses.
_WEIGHT_OF_ALL: Final = 0.02


class DraftGuesses:
    """Those of one request."""

    def __init__(self, of_all: Acceptance) -> None:
        self._of_all = of_all
        self.acceptance = Acceptance(of_all.rate)
        self.num_computed = 0
        """Tokens whose keys and values the draft model has in the request's blocks."""
        self.on_trial = False
        self._newest = self._chunk_end = 0  # position, of the step in progress

    def planned(self, num_tokens: int, chunk_end: int) -> None:
        """A step begins, with so many tokens known, that computes those before `chunk_end` without a guess."""
        self._newest, self._chunk_end = num_tokens - 1, chunk_end

    def came(self, token_ids: Sequence[int], num_tried: int) -> None:
        """Learn from what was tried; the last guess has never been an input of the draft model."""
        self.num_computed = max(self.num_computed, self._chunk_end)
        if not num_tried:
            return
        num_true = min(len(token_ids) - 1, num_tried)
        for each in (self.acceptance, self._of_all):
            each.hear(num_true, ends_wrong=num_true < num_tried)
        self.num_computed = self._newest + min(1 + num_true, num_tried)
        self.on_trial = False

    def lose_blocks(self) -> None:
        """All is to be computed again."""
        self.num_computed = self._chunk_end = 0


@dataclass
class DraftModelSpeculation:
    """Chooses for whom the draft model guesses, and how much of whose text it computes."""

    num_tokens: int  # guessed for a sequence in a step at most
    max_model_len: int  # of the draft model: it guesses no further
    max_chunk: int  # tokens
    rates: RateLearner  # of the model that confirms
    draft_rates: RateLearner
    acceptance: Acceptance = field(default_factory=lambda: Acceptance(weight=_WEIGHT_OF_ALL))
    _trials_s: float = 0.0

    def new_guesses(self) -> DraftGuesses:
        """Of a request that generates for the first time here."""
        return DraftGuesses(self.acceptance)

    def plan(self, candidates: Sequence[Candidate], max_guesses: int, shape: StepShape) -> Plan:
        """How many guesses to try for each candidate, `max_guesses` in all at most, and what to compute for them."""
        known = [_of(each.guesses) for each in candidates]
        rows = [self._row(*each) for each in zip(candidates, known, strict=True)]
        wanted = self._lengths(rows, max_guesses, shape)
        behind = [len(each.token_ids) - own.num_computed for each, own in zip(candidates, known, strict=True)]
        if all(num_behind <= _AT_HAND for num_behind in behind):
            lengths = list(wanted)
        else:
            ready = [row if n <= _AT_HAND else replace(row, max_guesses=0) for row, n in zip(rows, behind, strict=True)]
            lengths = self._lengths(ready, max_guesses, shape)
        self._choose_trial(rows, known, behind, wanted, shape)
        left = max_guesses - sum(lengths)
        for i, own in enumerate(known):
            if own.on_trial and not lengths[i] and behind[i] <= _AT_HAND and rows[i].max_guesses and left:
                lengths[i], left = 1, left - 1
        chunks = [
            DraftChunk(i, own.num_computed, len(each.token_ids))
            for i, (each, own) in enumerate(zip(candidates, known, strict=True))
            if lengths[i]
        ]
        late = [
            i
            for i, own in enumerate(known)
            if behind[i] > _AT_HAND
            and (own.on_trial or self._pays(candidates[i], rows[i], behind[i], i, wanted, shape))
        ]
        catching_up = self._catch_up(late, candidates, known, shape)
        ends = {chunk.row: chunk.end for chunk in catching_up}
        for i, (each, own) in enumerate(zip(candidates, known, strict=True)):
            own.planned(len(each.token_ids), ends.get(i, 0))
        return Plan([(TO_BE_DRAFTED,) * length for length in lengths], [*chunks, *catching_up])

    def _row(self, candidate: Candidate, guesses: DraftGuesses) -> Row:
        num_tokens = len(candidate.token_ids)
        most = min(self.num_tokens, candidate.max_guesses, self.max_model_len - num_tokens)
        return Row(guesses.acceptance.rate, max(0, most), num_tokens)

    def _lengths(self, rows: Sequence[Row], max_guesses: int, shape: StepShape) -> list[int]:
        return choose_lengths(rows, max_guesses, shape, self.rates.rates, self.draft_rates.rates)

    def _pays(
        self, candidate: Candidate, row: Row, num_behind: int, place: int, wanted: Sequence[int], shape: StepShape
    ) -> bool:
        """Whether a sequence that is behind is expected to win, by guesses, the time that it takes to catch up.

        What it wins in a step: the time of the tokens that its guesses bring, less that of its guesses, with its part
        of the draft model's passes.
        """
        rates, draft = self.rates.rates, self.draft_rates.rates
        if not wanted[place]:
            return False
        num_more = row.expected(wanted[place])
        cost_s = wanted[place] * (guess_s(row, rates) + guess_s(row, draft))
        cost_s += max(wanted) * draft.base_s / sum(map(bool, wanted))
        won_s = num_more * rates.step_s(shape) / len(wanted) - cost_s
        num_steps = min(candidate.num_said, candidate.num_to_come) / (1 + num_more)
        return num_steps * won_s >= draft.base_s + draft.prompt_s(num_behind, len(candidate.token_ids) - num_behind)

    def _choose_trial(
        self,
        rows: Sequence[Row],
        known: Sequence[DraftGuesses],
        behind: Sequence[int],
        wanted: Sequence[int],
        shape: StepShape,
    ) -> None:
        """Put the sequence on trial that costs least, if as much has been saved up, and good guesses would pay."""
        rates, draft = self.rates.rates, self.draft_rates.rates
        self._trials_s = min(self._trials_s + _TRIALS * rates.step_s(shape), _MAX_TRIALS_S)
        idle = [i for i, row in enumerate(rows) if row.max_guesses and not wanted[i]]
        if not idle or any(own.on_trial for own in known):
            return
        i = min(idle, key=lambda i: behind[i])
        cost_s = draft.base_s + draft.prompt_s(behind[i]) + guess_s(rows[i], rates) + guess_s(rows[i], draft)
        if self._trials_s < cost_s:
            return
        hoped = [replace(row, acceptance=max(row.acceptance, _HOPED)) for row in rows]
        if self._lengths(hoped, len(rows) * self.num_tokens, shape)[i]:
            self._trials_s -= cost_s
            known[i].on_trial = True

    def _catch_up(
        self, late: Sequence[int], candidates: Sequence[Candidate], known: Sequence[DraftGuesses], shape: StepShape
    ) -> list[DraftChunk]:
        """As many tokens as a part of the step's time allows, of one sequence after the other; never the newest."""
        draft = self.draft_rates.rates
        is_alone = shape.num_running == 1 and not shape.num_prompt_tokens
        left_s = (_SHARE_ALONE if is_alone else _SHARE_BESIDE_OTHERS) * self.rates.rates.step_s(shape)
        chunks: list[DraftChunk] = []
        for i in late:
            start, end = known[i].num_computed, len(candidates[i].token_ids) - 1
            token_s = draft.prompt_token_s + draft.prompt_pair_s * end
            num_tokens = min(end - start, self.max_chunk, max(int(left_s / token_s), 0 if chunks else _MIN_CHUNK))
            if num_tokens <= 0:
                break
            chunks.append(DraftChunk(i, start, start + num_tokens))
            left_s -= num_tokens * token_s
        return chunks


def _of(guesses: Guesses) -> DraftGuesses:
    assert isinstance(guesses, DraftGuesses)
    return guesses
