"""Words what a step brought for a request: a token for the frame's columns, or an output of its own."""

from __future__ import annotations

from typing import NamedTuple

from tandem.v1 import worker_pb2 as pb

from services.decode.endings import error_of
from services.decode.live import LiveRequest
from services.engine.api import FinishReason, RequestUpdate
from services.worker import convert


class News(NamedTuple):
    """The news of a step for one request: a token, or more than that."""

    live: LiveRequest
    token_id: int
    output: pb.Output | None = None
    num_cached_tokens: int = 0
    num_recomputes: int = 0

    @property
    def is_last(self) -> bool:
        """Whether nothing more will come."""
        return self.output is not None and self.output.finish_reason != pb.FINISH_REASON_UNSPECIFIED


def news_of_first(live: LiveRequest, first: pb.PrefillFinished) -> News:
    """The token that came with a handoff; the engine's own outputs come after it, by the loop's order."""
    output = pb.Output(
        handle=live.order.handle,
        token_ids=[first.token_id],
        prompt_logprobs=first.prompt_logprobs,
        finish_reason=first.finish_reason,
    )
    if first.HasField("logprobs"):
        output.logprobs.append(first.logprobs)
    if first.HasField("stop_token_id"):
        output.stop_token_id = first.stop_token_id
    return News(live, first.token_id, output)


def news_of_step(live: LiveRequest, update: RequestUpdate) -> list[News]:
    """Each token by itself where nothing else came: in a frame, outputs stand before all tokens of earlier steps."""
    is_last = update.finish_reason is not None
    is_first = update.num_output_tokens - len(update.new_tokens) == len(live.order.resumed_token_ids)
    if is_last or is_first or any(token.logprobs is not None for token in update.new_tokens):
        return [news_of(live, update)]
    return [News(live, token.token_id) for token in update.new_tokens]


def news_of(live: LiveRequest, update: RequestUpdate) -> News:
    """All of it as one output."""
    num_recomputes = update.num_preemptions if update.finish_reason is not None else 0
    return News(live, 0, _output(live, update), update.num_cached_tokens, num_recomputes)


def _output(live: LiveRequest, update: RequestUpdate) -> pb.Output:
    output = pb.Output(handle=live.order.handle, token_ids=[token.token_id for token in update.new_tokens])
    output.logprobs.extend(
        convert.logprobs_to_proto(token.logprobs) for token in update.new_tokens if token.logprobs is not None
    )
    if update.prompt_logprobs is not None:
        output.prompt_logprobs.extend(convert.prompt_logprobs_to_proto(update.prompt_logprobs))
    if update.stop_token_id is not None:
        output.stop_token_id = update.stop_token_id
    if update.finish_reason is FinishReason.ERROR:
        output.finish_reason = pb.FINISH_REASON_ERROR
        output.error.CopyFrom(error_of(pb.ERROR_CODE_INTERNAL, update.failure or "no token to sample"))
    elif update.finish_reason is not None:
        output.finish_reason = convert.FINISH_REASONS[update.finish_reason]
    return output
