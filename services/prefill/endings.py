"""Words the end of an order at the prefill worker: the first token, or why there is none, and the log's facts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from tandem.v1 import worker_pb2 as pb

from kvstore.errors import PeerLost
from services.engine.api import FinishReason, InvalidRequest, QueueFull, RequestUpdate
from services.worker import convert
from services.worker.engine_thread import EngineCrashed

log = logging.getLogger(__name__)

_ERRORS: Final[Mapping[type[Exception], pb.ErrorCode]] = {
    InvalidRequest: pb.ERROR_CODE_INVALID,
    QueueFull: pb.ERROR_CODE_OVERLOADED,
    EngineCrashed: pb.ERROR_CODE_UNAVAILABLE,
    PeerLost: pb.ERROR_CODE_UNAVAILABLE,
}


def facts_of(message: pb.PrefillRequest, seconds: float) -> dict[str, object]:
    """Return the log's facts of an order beside its outcome."""
    return {
        "request_id": message.request_id,
        "prompt_tokens": len(message.prompt_token_ids),
        "resumed_tokens": len(message.resumed_token_ids),
        "reader": message.reader_peer_id.partition("/")[0],
        "transfer": message.transfer_id.hex(),
        "seconds": round(seconds, 4),
    }


def error_of(failure: BaseException) -> pb.Error:
    """What the caller is told. What nobody raises on purpose is logged."""
    for kind, code in _ERRORS.items():
        if isinstance(failure, kind):
            return pb.Error(code=code, message=str(failure))
    log.error("an order failed", exc_info=failure)
    return pb.Error(code=pb.ERROR_CODE_INTERNAL, message=f"{type(failure).__name__}: {failure}")


def finished_of(update: RequestUpdate, fetched: list[pb.FetchedPrefix]) -> pb.PrefillFinished:
    token = update.new_tokens[0]
    message = pb.PrefillFinished(
        token_id=token.token_id,
        num_cached_tokens=update.num_cached_tokens,
        num_resumed_tokens=len(update.request.resumed_token_ids),
        stamps=convert.stamps_to_proto(update.request.timeline),
        fetched=fetched,
    )
    if token.logprobs is not None:
        message.logprobs.CopyFrom(convert.logprobs_to_proto(token.logprobs))
    if update.prompt_logprobs is not None:
        message.prompt_logprobs.extend(convert.prompt_logprobs_to_proto(update.prompt_logprobs))
    if update.finish_reason is not None and update.finish_reason is not FinishReason.HANDED_OFF:
        message.finish_reason = convert.FINISH_REASONS[update.finish_reason]
    if update.stop_token_id is not None:
        message.stop_token_id = update.stop_token_id
    return message


def failed_of(code: pb.ErrorCode, message: str) -> pb.PrefillEvent:
    return pb.PrefillEvent(failed=pb.Error(code=code, message=message))
