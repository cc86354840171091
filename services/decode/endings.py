"""Words the end of a decode worker's requests: the router's error, and one line of the log."""

from __future__ import annotations

import logging

from tandem.v1 import worker_pb2 as pb

from services.decode.live import LiveRequest
from services.lifecycle import Event

log = logging.getLogger(__name__)


def log_refusal(order: pb.GenerateRequest, code: pb.ErrorCode) -> None:
    log.info("request refused", extra={"request_id": order.request_id, "error": _word(code)})


def _word(code: pb.ErrorCode) -> str:
    return pb.ErrorCode.Name(code).removeprefix("ERROR_CODE_").lower()


def log_end(live: LiveRequest, output: pb.Output) -> None:
    """Log one line per request: an error's code, not its message, which may quote the request."""
    usage, reason = live.usage, pb.FinishReason.Name(output.finish_reason).removeprefix("FINISH_REASON_").lower()
    seconds = live.timeline.seconds_between(Event.RECEIVED, Event.FINISHED)
    facts = {
        "request_id": live.order.request_id,
        "finish_reason": reason,
        "error": _word(output.error.code) if output.HasField("error") else None,
        "prompt_tokens": usage.num_prompt_tokens,
        "cached_tokens": usage.num_cached_tokens,
        "generated_tokens": usage.num_generated_tokens,
        "prefilled_by": "itself" if usage.prefilled_locally else usage.prefill_worker_id or None,
        "handoff_blocks": usage.num_transferred_blocks,
        "recomputes": usage.num_recomputes,
        "redirects": usage.num_redirects or None,
        "seconds": round(seconds or 0.0, 4),
    }
    level = logging.WARNING if output.finish_reason == pb.FINISH_REASON_ERROR else logging.INFO
    log.log(level, "request ended", extra={name: value for name, value in facts.items() if value is not None})


def error_of(code: pb.ErrorCode, message: str) -> pb.Error:
    return pb.Error(code=code, message=message)


def error_output(handle: int, error: pb.Error) -> pb.Output:
    return pb.Output(handle=handle, finish_reason=pb.FINISH_REASON_ERROR, error=error)
