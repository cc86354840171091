"""Runs one HTTP request's generation, prompts times n sequences: orders, deltas, metrics, and the end."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client import Gauge
from tandem.v1 import worker_pb2 as pb

from services.lifecycle import Event, Timeline
from services.router.errors import ApiError, from_worker, invalid
from services.router.finished import Account
from services.router.fleet import Dispatch
from services.router.metrics import ModelMetrics
from services.router.openai.choice import Choice, Delta
from services.router.openai.requests import GenerationRequest
from services.router.receipt import make_receipt
from services.router.text import ServedModel

log = logging.getLogger(__name__)

_ARRIVALS_AT_ONCE = 64
_MIN_SHARED_BYTES = 128  # of smaller ones it is not worth while


@dataclass(frozen=True)
class GenerationPlan:
    """A checked and tokenized request. Sequence `index` is choice `index % n` of prompt `index // n`."""

    model: ServedModel
    request: GenerationRequest
    request_id: str
    prompts: Sequence[Sequence[int]]
    max_tokens: Sequence[int]
    """Per prompt; at least 1."""
    discard_generated: bool = False
    echoed: Sequence[str] | None = None
    """The prompts' texts, where the answer begins with them."""

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.request.body.n

    @property
    def wants_logprobs(self) -> bool:
        """Of the tokens of the answer."""
        return self.request.sampling.HasField("logprobs")

    @property
    def num_bytes(self) -> int:
        """About as much memory as it takes: prompts, packed, their texts, and lists of tokens."""
        num_tokens, num_chars = sum(map(len, self.prompts)), sum(map(len, self.echoed or ()))
        return 4 * num_tokens + num_chars + 16 * self.request.lists.ByteSize()

    @functools.cached_property
    def shared_lists(self) -> pb.SamplingParams | None:
        """The lists of tokens that workers get apart from the orders; None: each order has them."""
        lists = self.request.lists
        return lists if self.num_sequences > 1 and lists.ByteSize() >= _MIN_SHARED_BYTES else None

    def order(self, index: int, timeout_s: float, cache_salt: str) -> pb.GenerateRequest:
        """Makes the order for a sequence's worker, without its prompt and `shared_lists`. `cache_salt` is the workers',
        not the client's."""
        prompt, choice = divmod(index, self.request.body.n)
        sampling = self.request.sampling_for(choice, self.max_tokens[prompt])
        if self.shared_lists is None:
            sampling.MergeFrom(self.request.lists)
        return pb.GenerateRequest(
            request_id=self.request_id if self.num_sequences == 1 else f"{self.request_id}-{index}",
            model=self.model.name,
            sampling=sampling,
            priority=self.request.body.priority,
            cache_salt=cache_salt,
            adapter=self.model.adapter,
            timeout_s=timeout_s,
        )


def tokens_to_generate(
    request: GenerationRequest, num_prompt_tokens: int, prompt_field: str, default: int | None, max_model_len: int
) -> int:
    """max_tokens of a sequence: what the client asked for, else the default as far as it fits, else all that fits.

    Raises ApiError with OpenAI's context_length_exceeded where prompt and answer do not fit into the context; it names
    what the client wrote: `prompt_field`, or the number of tokens where a smaller one would do.
    """
    room, asked = max_model_len - num_prompt_tokens, request.max_tokens
    wanted = max(asked if asked is not None else min(default or room, room), 1)
    if num_prompt_tokens == 0:
        raise invalid("The prompt has no tokens.", prompt_field)
    if wanted > room:
        raise _too_long(
            max_model_len,
            f"requested {num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the prompt; {wanted} for the"
            " completion). Please reduce the length of the prompt or completion.",
            prompt_field if asked is None or room < 1 else request.max_tokens_field,
        )
    return wanted


def prompt_too_long(max_model_len: int, at_least: int, prompt_field: str) -> ApiError:
    """The error of a text that was not tokenized to its end."""
    words = f"requested at least {at_least} tokens in the prompt. Please reduce the length of the prompt."
    return _too_long(max_model_len, words, prompt_field)


def _too_long(max_model_len: int, requested: str, field: str) -> ApiError:
    return invalid(
        f"This model's maximum context length is {max_model_len} tokens. However, you {requested}",
        field,
        "context_length_exceeded",
    )


@dataclass(frozen=True)
class UsageCount:
    """Tokens of the request so far."""

    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int | None = None
    """Reported with a sequence's last output; not known where a stop string ended one before that."""

    def to_json(self) -> dict[str, object]:
        usage: dict[str, object] = {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_generated_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_generated_tokens,
        }
        if self.num_cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.num_cached_tokens}
        return usage


class Generation:
    """Runs a plan. The owner calls `start`, then `deltas` until `finished`, and `close` whatever happens."""

    def __init__(
        self,
        plan: GenerationPlan,
        dispatch: Dispatch,
        metrics: ModelMetrics,
        timeline: Timeline,
        account: Account,
    ) -> None:
        self.plan = plan
        self._account = account
        self._body = plan.request.body
        self._dispatch = dispatch
        self._metrics = metrics
        self._timeline = timeline
        self._choices = [
            Choice(index, plan.request, plan.model, plan.prompts[index // self._body.n], plan.discard_generated)
            for index in range(plan.num_sequences)
        ]
        self._num_unfinished = plan.num_sequences
        self._started = False
        self._merged: dict[int, Delta] = {}  # news that `deltas` has not given yet

    def start(self) -> None:
        """Counts its sequences as waiting from now on, here or at a worker."""
        self._started = True
        self._metrics.num_waiting.inc(len(self._choices))

    @property
    def finished(self) -> bool:
        return self._num_unfinished == 0

    async def deltas(self, idle_s: float | None = None) -> list[Delta]:
        """Waits for news, `idle_s` at most; one delta per choice that has any, in order of their first news.

        Raises ApiError.
        """
        while not self._merged:
            arrivals = await self._dispatch.arrivals(idle_s)
            if not arrivals:
                break
            for number, (index, token_ids, output) in enumerate(arrivals, start=1):
                self._take(index, token_ids, output)
                if number % _ARRIVALS_AT_ONCE == 0:
                    await asyncio.sleep(0)  # many pile up for who is slow: others are served between
        merged, self._merged = self._merged, {}
        return list(merged.values())

    def show_at_once(self, can_show: Callable[[], bool], show: Callable[[Delta], None]) -> None:
        """From now on a token that comes while `deltas` waits is shown in that moment, if it can be: no task has
        to wake up. Only where there is one sequence: what a frame has for several is shown together.
        """

        def take(index: int, token_ids: list[int]) -> bool:
            choice = self._choices[index]
            if choice.finished or not can_show():
                return False
            delta = self._feed(choice, token_ids, None)
            if choice.finished:  # by a stop string: what is to be done at the end takes a task
                self._merged[index] = delta
                return False
            show(delta)
            return True

        if len(self._choices) == 1:
            self._dispatch.at_once = take

    def _take(self, index: int, token_ids: list[int], output: pb.Output | None) -> None:
        choice = self._choices[index]
        if choice.finished:
            return  # by a stop string, whatever became of it at its worker since
        if output is not None and output.finish_reason == pb.FINISH_REASON_ERROR:
            raise from_worker(output.error)
        delta = self._feed(choice, token_ids, output)
        if index in self._merged:
            self._merged[index].extend(delta)
        else:
            self._merged[index] = delta

    def usage(self) -> UsageCount:
        """Sums usage over all sequences; a prompt counts once, however many answers it has."""
        reports = [choice.usage for choice in self._choices[:: self._body.n]]
        cached = sum(report.num_cached_tokens for report in reports if report is not None)
        return UsageCount(
            sum(map(len, self.plan.prompts)),
            sum(choice.num_tokens for choice in self._choices),
            None if None in reports else cached,
        )

    def receipt(self) -> dict[str, object] | None:
        """Returns an answer's `receipt`, if the client asked for it: one per sequence, null where none is known."""
        if not self._body.receipt:
            return None
        return {
            "request_id": self.plan.request_id,
            "sequences": [choice.receipt and choice.receipt.to_json() for choice in self._choices],
        }

    def usage_of(self, index: int) -> UsageCount:
        """Returns one sequence's usage, for continuous_usage_stats."""
        return UsageCount(len(self.plan.prompts[index // self._body.n]), self._choices[index].num_tokens)

    def facts(self) -> dict[str, object]:
        """Returns the facts for the log: counts, seconds, ids of workers; nothing that the client wrote."""
        usage, timeline = self.usage(), self._timeline
        served = [by for by in map(self._dispatch.served_by, range(self.plan.num_sequences)) if by is not None]
        prefilled_by = {choice.receipt.prefill_worker_id for choice in self._choices if choice.receipt is not None}
        facts: dict[str, object] = {
            "model": self.plan.model.name,
            "stream": self._body.stream,
            "prompt_tokens": usage.num_prompt_tokens,
            "cached_tokens": usage.num_cached_tokens,
            "generated_tokens": usage.num_generated_tokens,
            "finish_reason": ",".join(choice.finish_reason for choice in self._choices if choice.finish_reason) or None,
            "ttft_seconds": timeline.seconds_between(Event.ARRIVED, Event.FIRST_TOKEN),
            "decoded_by": ",".join(sorted({by.placement.decision.decode.worker_id for by in served})) or None,
            "prefilled_by": ",".join(sorted(prefilled_by)) or None,
            "attempts": max((by.num_attempts for by in served), default=0),
            "resumes": sum(len(by.resumes) for by in served) or None,
        }
        if isinstance(facts["ttft_seconds"], float):
            facts["ttft_seconds"] = round(facts["ttft_seconds"], 4)
        return {name: value for name, value in facts.items() if value is not None}

    def close(self, error: BaseException | None) -> None:
        """Ends what still runs; `error` is what ended the request early, None after its regular end."""
        early = "the client has gone, or a deadline has passed" if error is not None and not str(error) else str(error)
        self._dispatch.close("the request has ended" if error is None else early)
        if not self._started:
            return
        reason = "error" if isinstance(error, ApiError) else "abort"
        for choice in self._choices:
            if not choice.finished:
                self._gauge(choice).dec()
                self._metrics.count_finished(reason)
                if reason == "error":
                    self._settle(choice, reason)

    # ---- one sequence ---------------------------------------------------------

    def _feed(self, choice: Choice, token_ids: list[int], output: pb.Output | None) -> Delta:
        if token_ids:
            self._observe_tokens(choice, len(token_ids))
        delta = choice.feed(token_ids, output)
        if choice.finished:
            self._finish(choice, delta, output)
        return delta

    def _observe_tokens(self, choice: Choice, num_tokens: int) -> None:
        now = self._timeline.clock()
        if choice.last_token_s is None:
            choice.first_token_s = now
            if Event.FIRST_TOKEN not in self._timeline.unix_s:
                self._timeline.mark(Event.FIRST_TOKEN)
            self._metrics.time_to_first_token.observe(now - self._timeline.unix_s[Event.ARRIVED])
            self._metrics.num_waiting.dec()
            self._metrics.num_running.inc()
        else:
            self._metrics.inter_token_latency.observe((now - choice.last_token_s) / num_tokens)
        choice.last_token_s = now
        self._metrics.generation_tokens.inc(num_tokens)

    def _finish(self, choice: Choice, delta: Delta, output: pb.Output | None) -> None:
        self._num_unfinished -= 1
        choice.finish_reason = delta.finish_reason or "stop"
        if output is None or not output.finish_reason:
            self._dispatch.abort(choice.index, "a stop string was generated")
        self._timeline.mark(Event.FINISHED)
        self._gauge(choice).dec()
        self._metrics.count_finished(choice.finish_reason)
        self._metrics.e2e_request_latency.observe(
            self._timeline.unix_s[Event.FINISHED] - self._timeline.unix_s[Event.ARRIVED]
        )
        self._metrics.request_prompt_tokens.observe(len(self.plan.prompts[choice.index // self._body.n]))
        self._metrics.request_generation_tokens.observe(choice.num_tokens)
        self._make_receipt(choice, output)
        self._settle(choice, choice.finish_reason)

    def _settle(self, choice: Choice, finish_reason: str) -> None:
        self._account.settle(
            self.plan.model.name,
            finish_reason,
            len(self.plan.prompts[choice.index // self._body.n]),
            choice.usage.num_cached_tokens if choice.usage is not None else 0,
            choice.num_tokens,
            arrived_s=self._timeline.unix_s[Event.ARRIVED],
            first_token_s=choice.first_token_s,
            last_token_s=choice.last_token_s,
            unix_s=self._timeline.clock(),
        )

    def _gauge(self, choice: Choice) -> Gauge:
        return self._metrics.num_waiting if choice.last_token_s is None else self._metrics.num_running

    def _make_receipt(self, choice: Choice, output: pb.Output | None) -> None:
        served_by = self._dispatch.served_by(choice.index)
        if choice.usage is None or served_by is None:
            return
        own = (Event.ARRIVED, Event.TOKENIZED, Event.FINISHED)
        router_unix_s = {event: self._timeline.unix_s[event] for event in own}
        router_unix_s[Event.ROUTED] = served_by.routed_unix_s
        if choice.first_token_s is not None:
            router_unix_s[Event.FIRST_TOKEN] = choice.first_token_s
        choice.receipt = make_receipt(
            choice.index,
            choice.usage,
            output.stamps if output is not None else (),
            router_unix_s,
            decode_worker_id=served_by.placement.decision.decode.worker_id,
            numerics=served_by.placement.decision.decode.numerics,
            block_size=served_by.placement.space.block_size,
            num_attempts=served_by.num_attempts,
            num_generated_tokens=choice.num_tokens,
            is_simulation=served_by.placement.decision.decode.is_simulation,
            resumes=served_by.resumes,
            objectives=self._account.objectives,
            deflected=served_by.placement.decision.deflected,
        )
        self._metrics.count_receipt(choice.receipt)
        log.debug("%s", choice.receipt)
