"""Gives a sequence to a worker: chooses one, fills its order in, and sends it; the next one where that fails.

What is at most once is the order that a session has taken. What becomes of it there is the dispatch's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

from tandem.v1 import worker_pb2 as pb

from services.orders import LISTS, MOVES, RESUMES
from services.router.errors import ApiError, overloaded, unavailable
from services.router.fleet.placed import Ask, Placement
from services.router.fleet.placement import Placer
from services.router.fleet.prefixes import PrefixFinder
from services.router.fleet.sequence import Sequence
from services.router.fleet.session import SessionDown, SessionFull
from services.router.fleet.sink import OutputSink
from services.router.fleet.workers import Workers
from services.router.metrics import RouterMetrics
from services.router.routing import Refusal

log = logging.getLogger(__name__)


class Submitter:
    """Of one HTTP request. Keeps nothing: what it learns, it notes in the sequence."""

    def __init__(
        self,
        workers: Workers,
        placer: Placer,
        prefixes: PrefixFinder,
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._workers = workers
        self._placer = placer
        self._prefixes = prefixes
        self._metrics = metrics
        self._clock = clock

    def submit(self, sequence: Sequence, ask: Ask, sink: OutputSink, retried_after: str = "") -> Refusal | None:
        """Send it to the best worker that was not tried; Refusal: nobody takes it."""
        while True:
            attempt = sequence.num_attempts + 1
            # A sequence that moves goes where there is room for it, if there still is.
            places = set(self.places_to_move_to(sequence)) - set(sequence.tried) if sequence.move is not None else ()
            placement = self._placer.place(
                ask,
                sequence.tried,
                among=places,
                attempt=attempt,
                retried_after=retried_after,
                numerics=sequence.numerics,
            )
            if isinstance(placement, Refusal):
                return placement
            sequence.tried.append(placement.decision.decode.worker_id)
            sequence.num_attempts += 1
            try:
                self._send(sequence, ask, placement, sink)
            except (SessionDown, SessionFull) as error:
                log.info("%s", error, extra={"request_id": sequence.request_id})
                sequence.was_full = isinstance(error, SessionFull)
                retried_after = "session full" if sequence.was_full else "session down"
                continue
            decision = placement.decision
            self._metrics.count_decision(
                decision.policy.value, decision.cause, decision.prefills_locally, decision.deflected
            )
            log.debug("%s", decision.reason, extra={"request_id": sequence.request_id})
            return None

    def _send(self, sequence: Sequence, ask: Ask, placement: Placement, sink: OutputSink) -> None:
        message = pb.SessionRequest(generate=ask.order)  # a copy: the next attempt needs the bare order
        order = message.generate
        order.prompt_token_ids.extend(ask.prompt)
        self._placer.fill_order(order, placement)
        session = self._workers.session(*placement.decode_key)
        num_repeated = 0
        if order.resumed_token_ids and RESUMES not in session.features:
            num_repeated = len(order.resumed_token_ids)
            for resumed_field in ("resumed_token_ids", "prompt_hashes", "prefix_sources"):
                order.ClearField(resumed_field)
        if MOVES not in session.features or order.move.worker_id == session.record.worker_id:
            order.ClearField("move")
        if sequence.ends_s is not None:
            order.timeout_s = max(sequence.ends_s - self._clock(), 0.001)
        lists = ask.lists
        if lists is not None and LISTS not in session.features:
            order.sampling.MergeFrom(lists)
            lists = None
        sequence.handle = session.submit(message, sink, lists)
        sequence.session = session
        sequence.placement = placement
        sequence.awaits_prefill = True
        sequence.num_repeated = num_repeated
        if sequence.resumes:
            sequence.resumes[-1].num_repeated_tokens = num_repeated
        placement.redirect = partial(session.redirect, sequence.handle)
        self._placer.sent(placement, comes_with_blocks=order.HasField("move"))

    def places_to_move_to(self, sequence: Sequence) -> Collection[str]:
        """Decode workers that have room for it, as it is now; none before it was sent, and after its end."""
        num_tokens = len(sequence.ask.prompt) + len(sequence.token_ids) + 1
        if sequence.placement is None or sequence.ended:
            return ()
        return self._placer.places_to_move_to(sequence.ask, sequence.placement, num_tokens)

    async def longer_ask(self, sequence: Sequence) -> Ask:
        """What it asks for now: prompt and tokens so far, and who holds their blocks."""
        ask, order = sequence.ask, sequence.resumed_order()
        spaces = self._workers.spaces(order.model, ask.fingerprints, order.adapter)
        context = [*ask.prompt, *order.resumed_token_ids]
        (blocks,) = await self._prefixes.find([context], order.cache_salt, spaces)
        return replace(ask, order=order, blocks=blocks)

    def refused(self, refusal: Refusal, sequence: Sequence) -> ApiError:
        """Counts the refusal, and words it for the client."""
        model = sequence.ask.order.model
        if sequence.was_full:
            self._metrics.count_refusal("workers_full")
            return overloaded(f"Model `{model}`: the workers do not take orders fast enough. Try again later.")
        self._metrics.count_refusal(refusal.value)
        words = {
            Refusal.NO_WORKER: "no decode worker is registered",
            Refusal.NOT_CONNECTED: "no decode worker can be reached",
            Refusal.DRAINING: "every decode worker is shutting down",
            Refusal.ALL_TRIED: "every decode worker was tried",
            Refusal.TOO_SHORT: "no decode worker with so long a context can be reached",
        }
        return unavailable(f"Model `{model}`: {words[refusal]}. Try again later.")
