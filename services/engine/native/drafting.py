"""Has a small model guess what a step will sample, before the step is run: the guesses of all sequences together.

The draft model samples as the step will: same parameters, same seed, same noise for the place (`sampling`). So where
its logits are near to those of the model that confirms, it draws the same tokens, too, and not only ones as probable.
Its keys and values lie in a cache of their own under the block ids of the sequences. Nobody else reads that: it is
neither handed over nor stored, proven nor found by prefix. Requests that share a block share what it computed there,
which is the same, being of the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import Tensor

from services.engine.config import EngineConfig
from services.engine.native.model import LoadedModel
from services.engine.native.runner import ModelRunner, Runner
from services.engine.native.scheduling import Batch, Request, SampledBatch, ScheduledSequence, SchedulerConfig, shape_of
from services.engine.native.speculation import (
    TO_BE_DRAFTED,
    DraftModelSpeculation,
    NgramSpeculation,
    Speculation,
)
from services.engine.native.warm_up import warm_up
from services.engine.request import SamplingParams
from services.rates import RateLearner


class DraftModel:
    """The model that guesses, with its keys and values: `kv_cache` `[num_blocks, ...]`, zeroed by whoever made it."""

    def __init__(self, model: LoadedModel, num_blocks: int, block_size: int, clock: Callable[[], float]) -> None:
        self.max_model_len = model.max_model_len
        self.kv_cache: Tensor = model.new_kv_cache(num_blocks, block_size)
        self.runner: Runner = ModelRunner(model, self.kv_cache, block_size)
        self.rates = RateLearner()
        """How long a pass takes."""
        self._clock = clock
        self._without_logprobs: WeakKeyDictionary[Request, SamplingParams] = WeakKeyDictionary()

    def warm_up(self, limits: SchedulerConfig, num_blocks: int) -> None:
        """Take the first passes, and learn from them how long they are."""
        for output in warm_up(self.runner, limits, num_blocks, self._clock):
            self.rates.step_ended(output.shape, output.duration_s)

    def draft(self, batch: Batch) -> tuple[ScheduledSequence, ...]:
        """Compute the batch's draft chunks; return its sequences with guesses in the place of TO_BE_DRAFTED.

        In as many passes as the longest draft has guesses, each over all sequences that want one more.
        """
        sequences = list(batch.sequences)
        # Those with most guesses first: the rows of a later pass are the first ones of those before it.
        chunks = sorted(batch.draft_chunks, key=lambda chunk: -len(sequences[chunk.row].draft))
        texts = [self._text(sequences[chunk.row].request) for chunk in chunks]
        drafts: list[list[int]] = [[] for _ in chunks]
        first = [
            ScheduledSequence(text, each.start, each.end - each.start, False, each.end == text.num_tokens, None)
            for text, each in zip(texts, chunks, strict=True)
        ]
        wanted = [len(sequences[chunk.row].draft) for chunk in chunks]
        going_on = list(range(len(chunks)))
        while going_on:
            rows = [_newest(texts[i]) if drafts[i] else first[i] for i in going_on]
            tokens = dict(zip(going_on, self._run(rows), strict=True))
            going_on = []
            for i, token_id in tokens.items():
                if token_id is not None and wanted[i]:
                    drafts[i].append(token_id)
                    texts[i].append_output(token_id)
                    if len(drafts[i]) < wanted[i]:
                        going_on.append(i)
        for chunk, draft in zip(chunks, drafts, strict=True):
            sequence = sequences[chunk.row]
            sequences[chunk.row] = sequence._replace(num_tokens=sequence.num_known + len(draft), draft=tuple(draft))
        assert not any(TO_BE_DRAFTED in sequence.draft for sequence in sequences), "a draft without its chunk"
        return tuple(sequences)

    def _run(self, sequences: Sequence[ScheduledSequence]) -> list[int | None]:
        """Compute one pass; the tokens that follow, None where none was asked for or none could be had."""
        started_s = self._clock()
        results = self.runner.run(Batch(tuple(sequences))).sequences
        self.rates.step_ended(shape_of(sequences), self._clock() - started_s)
        for sequence, result in zip(sequences, results, strict=True):
            if result.failure is not None:
                # What is no number stays none, and attention multiplies what it masks by zero.
                self.kv_cache[sequence.request.block_table] = 0
        return [result.tokens[0].token_id if result.tokens else None for result in results]

    def _text(self, request: Request) -> Request:
        """The request as it is before the step, to go on with guesses."""
        sampling = request.sampling
        if sampling.logprobs is not None:
            known = self._without_logprobs.get(request)
            sampling = known or replace(sampling, logprobs=None).with_lists_of(sampling)
            self._without_logprobs[request] = sampling
        text = Request(
            request.request_id, request.prompt_token_ids, sampling, output_token_ids=request.output_token_ids
        )
        text.block_table = request.block_table
        return text


def _newest(text: Request) -> ScheduledSequence:
    return ScheduledSequence(text, text.num_tokens - 1, 1, False, True, None)


class DraftingRunner:
    """Runs the steps of a model that confirms what another one guesses."""

    def __init__(self, runner: Runner, draft: DraftModel, clock: Callable[[], float]) -> None:
        self._runner = runner
        self.draft = draft
        self._clock = clock
        self.drafting_s = 0.0
        """Of the last step: what the draft model took."""

    def run(self, batch: Batch) -> SampledBatch:
        """Guess what is to be drafted, then compute the batch's tokens, and sample."""
        started_s = self._clock()
        sequences = self.draft.draft(batch) if batch.draft_chunks else batch.sequences
        self.drafting_s = self._clock() - started_s if batch.draft_chunks else 0.0
        return self._runner.run(replace(batch, sequences=sequences))


def speculation_of(config: EngineConfig, rates: RateLearner, drafting: DraftingRunner | None) -> Speculation | None:
    """Guesses as the settings want them, by a draft model where there is one; None: none."""
    if drafting is not None:
        draft = drafting.draft
        return DraftModelSpeculation(
            config.num_speculative_tokens, draft.max_model_len, config.max_num_batched_tokens, rates, draft.rates
        )
    if config.speculative_method == "ngram":
        lookup_min, lookup_max = config.prompt_lookup_min, config.prompt_lookup_max
        return NgramSpeculation(config.num_speculative_tokens, lookup_min, lookup_max, rates)
    return None
