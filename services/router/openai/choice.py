"""Builds one answer: takes a worker's outputs, detokenizes, applies stop strings, gives text deltas."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tandem.v1 import worker_pb2 as pb

from services.router.openai.columns import Column, Columns
from services.router.openai.requests import GenerationRequest
from services.router.receipt import Receipt
from services.router.text import Detokenizer, ServedModel, StopMatcher


@dataclass(slots=True)
class Delta:
    """The news of choice `index`."""

    index: int
    text: str = ""
    token_ids: MutableSequence[int] = field(default_factory=list)
    logprobs: list[pb.PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[pb.PositionLogprobs] = field(default_factory=list)
    shown_logprobs: Columns = field(default_factory=dict)
    """What the renderer makes of them, in the place of the two above."""
    shown_prompt_logprobs: Column = field(default_factory=Column)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def num_bytes(self) -> int:
        """Of a part of a whole answer: its text as it is and as JSON, packed token ids, and log probabilities."""
        shown = sum(len(column.text) for column in (*self.shown_logprobs.values(), self.shown_prompt_logprobs))
        return 4 * len(self.text) + 4 * len(self.token_ids) + shown

    def extend(self, later: Delta) -> None:
        """Takes a later delta of the same choice in."""
        self.text += later.text
        self.token_ids.extend(later.token_ids)
        self.logprobs += later.logprobs
        self.prompt_logprobs += later.prompt_logprobs
        for name, column in later.shown_logprobs.items():
            self.shown_logprobs.setdefault(name, Column()).extend(column)
        self.shown_prompt_logprobs.extend(later.shown_prompt_logprobs)
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


class Choice:
    """The state of one sequence on the router."""

    def __init__(
        self, index: int, request: GenerationRequest, model: ServedModel, prompt: Sequence[int], discard: bool
    ) -> None:
        """`discard`: the generated token is not wanted, only what comes with it (echo with max_tokens=0)."""
        self.index = index
        self.num_tokens = 0
        self.finished = False
        self.finish_reason = ""
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.usage: pb.Usage | None = None
        self.receipt: Receipt | None = None
        self._request = request
        self._shows_stop = request.body.include_stop_str_in_output
        self._eos_token_ids = model.files.eos_token_ids
        self._discard = discard
        self._model = model
        self._prompt = prompt
        self._stops = StopMatcher(request.stops, self._shows_stop) if request.stops else None

    @cached_property
    def _text(self) -> Detokenizer:
        # Made with the first token: a request may have a thousand choices.
        return self._model.tokenizer.detokenizer(self._request.body.skip_special_tokens, self._prompt)

    def feed(self, token_ids: list[int], output: pb.Output | None = None) -> Delta:
        """Return the delta of tokens and their output. A stop string finishes the choice before the worker does."""
        delta = Delta(self.index)
        num_taken = self._take_text(delta, token_ids, output)
        if output is not None:
            self._take_rest(delta, output)
        self.finished = delta.finish_reason is not None
        if self._discard:
            delta.text, delta.finish_reason = "", "length" if self.finished else None
            delta.stop_reason = None
            return delta
        delta.token_ids = token_ids if num_taken == len(token_ids) else token_ids[:num_taken]
        if output is not None:
            delta.logprobs = list(output.logprobs[:num_taken])
        self.num_tokens += num_taken
        return delta

    def _take_rest(self, delta: Delta, output: pb.Output) -> None:
        delta.prompt_logprobs = list(output.prompt_logprobs)
        if output.HasField("usage"):
            self.usage = pb.Usage()
            self.usage.CopyFrom(output.usage)  # a part of a frame keeps all of it
        if delta.finish_reason is None and output.finish_reason:
            delta.finish_reason = "stop" if output.finish_reason == pb.FINISH_REASON_STOP else "length"
            # An end of sequence is no stop token of the client's.
            if output.HasField("stop_token_id") and output.stop_token_id in self._request.stop_token_ids:
                delta.stop_reason = output.stop_token_id

    def _num_hidden(self, output: pb.Output, token_ids: Sequence[int]) -> int:
        """1 if the last token ended the sequence and shall not show in the text, else 0."""
        if output.finish_reason != pb.FINISH_REASON_STOP or not token_ids or self._shows_stop:
            return 0
        stopped_by = output.stop_token_id if output.HasField("stop_token_id") else None
        return int(token_ids[-1] == stopped_by or token_ids[-1] in self._eos_token_ids)

    def _take_text(self, delta: Delta, token_ids: list[int], output: pb.Output | None) -> int:
        """Sets the delta's text; returns how many of the tokens belong to the answer."""
        is_last = output is not None and bool(output.finish_reason)
        visible = token_ids[: len(token_ids) - self._num_hidden(output, token_ids)] if output is not None else token_ids
        if self._stops is None:
            delta.text = self._text.feed(visible) if visible else ""
            if is_last:
                delta.text += self._text.flush()
            return len(token_ids)
        # Token by token: the answer ends with the token that completes the stop string.
        for position, token_id in enumerate(visible):
            may_stop = self.num_tokens + position + 1 > self._request.sampling.min_tokens
            delta.text += self._stops.feed(self._text.feed((token_id,)), may_stop)
            if self._stopped(delta):
                return position + 1
        if is_last:
            delta.text += self._stops.feed(self._text.flush())
            if not self._stopped(delta):
                delta.text += self._stops.flush()
        return len(token_ids)

    def _stopped(self, delta: Delta) -> bool:
        if self._stops is None or self._stops.matched is None:
            return False
        delta.finish_reason, delta.stop_reason = "stop", self._stops.matched
        return True
