"""Converts protobuf messages and the engine's types. Values out of range raise InvalidRequest."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import get_args

from tandem.v1 import worker_pb2 as pb

from kvstore.block import HASH_BYTES, BlockHash, BlockLayout, hash_blocks, namespace, pack_hashes, unpack_hashes
from kvstore.threads import Threads
from services.budgets import UNLIMITED, Budgets, Role
from services.engine.api import (
    EngineLoad,
    FinishReason,
    InvalidRequest,
    PositionLogprobs,
    SamplingParams,
    TokenLogprob,
)
from services.lifecycle import Event, Timeline
from services.rates import Rates

log = logging.getLogger(__name__)

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.MOVED: pb.FINISH_REASON_MOVED,
}


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    """The engine's parameters; raises InvalidRequest where one is out of range."""
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=dict(message.logit_bias),
        allowed_token_ids=tuple(message.allowed_token_ids),
        seed=message.seed,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def logprobs_to_proto(logprobs: PositionLogprobs) -> pb.PositionLogprobs:
    message = pb.PositionLogprobs(top=[_token_to_proto(token) for token in logprobs.top])
    if logprobs.chosen is not None:
        message.chosen.CopyFrom(_token_to_proto(logprobs.chosen))
    return message


def logprobs_from_proto(message: pb.PositionLogprobs) -> PositionLogprobs:
    chosen = _token_from_proto(message.chosen) if message.HasField("chosen") else None
    return PositionLogprobs(chosen=chosen, top=tuple(_token_from_proto(token) for token in message.top))


def prompt_logprobs_to_proto(positions: Iterable[PositionLogprobs | None]) -> list[pb.PositionLogprobs]:
    """Position 0 has no predecessor to be predicted from: an empty message stands for it."""
    return [pb.PositionLogprobs() if position is None else logprobs_to_proto(position) for position in positions]


def context_token_ids(order: pb.GenerateRequest | pb.PrefillRequest) -> Sequence[int]:
    """What must be there before the order's first token is sampled: the prompt, and what is resumed of the output."""
    if not order.resumed_token_ids:
        return order.prompt_token_ids
    return [*order.prompt_token_ids, *order.resumed_token_ids]


async def prompt_hashes(
    order: pb.GenerateRequest | pb.PrefillRequest, layout: BlockLayout, threads: Threads
) -> list[BlockHash]:
    """The hashes of the context's full blocks: those that came with the order, else made here, in a thread, and put
    into the order for whoever it is passed on to."""
    root = namespace(layout.model_fingerprint, order.cache_salt, order.adapter)
    token_ids = context_token_ids(order)
    given, num_blocks = order.prompt_hashes, len(token_ids) // layout.block_size
    if not num_blocks:
        return []
    if given.root == root and given.block_size == layout.block_size:
        if len(given.hashes) == num_blocks * HASH_BYTES:
            return unpack_hashes(given.hashes)
        log.warning("the order has %d bytes of hashes for %d blocks", len(given.hashes), num_blocks)
    elif given.root:
        log.warning("the prompt was hashed for another model, salt, adapter or block size than ours: hashed anew")
    hashes = await threads.run(lambda: hash_blocks(root, token_ids, layout.block_size))
    made = pb.PromptHashes(root=root, block_size=layout.block_size, hashes=pack_hashes(hashes))
    order.prompt_hashes.CopyFrom(made)
    return hashes


def load_to_proto(load: EngineLoad, num_waiting_elsewhere: int = 0, draining: bool = False) -> pb.Load:
    return pb.Load(
        num_running=load.num_running,
        num_waiting=load.num_waiting + num_waiting_elsewhere,
        num_free_blocks=load.num_free_blocks,
        num_blocks=load.num_blocks,
        num_waiting_tokens=load.num_waiting_tokens,
        draining=draining,
        num_context_tokens=load.num_context_tokens,
    )


def budgets_from_proto(message: pb.Budgets) -> tuple[Role, Budgets]:
    """What a router wants of an elastic worker. Raises ValueError where it makes no sense."""
    if not message.tpot_s >= 0:  # NaN, too
        raise ValueError(f"seconds per token must not be negative, got {message.tpot_s}")
    num_tokens = min(message.prompt_tokens, UNLIMITED) if message.HasField("prompt_tokens") else UNLIMITED
    for role in get_args(Role):
        if message.role == role:
            return role, Budgets(message.tpot_s or math.inf, num_tokens)
    raise ValueError(f"the role must be one of {', '.join(get_args(Role))}, got {message.role!r:.80}")


def tpot_from_proto(order: pb.GenerateRequest) -> float:
    """Seconds per output token that the order's client is to get at most; infinite: whatever comes."""
    if not order.tpot_objective_s >= 0:
        raise InvalidRequest("tpot_objective_s", f"must not be negative, got {order.tpot_objective_s}")
    return order.tpot_objective_s or math.inf


def rates_to_proto(rates: Rates) -> pb.Rates:
    return pb.Rates(**rates.to_wire())


def stamps_to_proto(timeline: Timeline) -> list[pb.Stamp]:
    return [
        pb.Stamp(event=pb.Event.Name(event.value), unix_s=unix_s) for event, unix_s in list(timeline.unix_s.items())
    ]


def copy_stamps(stamps: Iterable[pb.Stamp], timeline: Timeline) -> None:
    """Take over another worker's stamps; events that only a newer worker knows are passed over."""
    known = {int(event) for event in Event}
    for stamp in stamps:
        if stamp.event in known:
            timeline.unix_s[Event(stamp.event)] = stamp.unix_s


def _token_to_proto(token: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=token.token_id, logprob=token.logprob, rank=token.rank)


def _token_from_proto(message: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=message.token_id, logprob=message.logprob, rank=message.rank)
