"""Carries out the pure choice (policies.py): takes the snapshot, and remembers what was sent where.

All of the router's mutable routing state is here: the policy's, the prefixes just sent, the log of decisions. It
belongs to the event loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from tandem.v1 import worker_pb2 as pb

from kvstore.block import pack_hashes
from services.router.fleet.answers import AnswerLengths
from services.router.fleet.placed import Ask, Placement
from services.router.fleet.prefixes import BlockSpace
from services.router.fleet.redirecting import Redirects, redirected
from services.router.fleet.workers import Workers
from services.router.routing import (
    MAX_CANDIDATES,
    NO_PREFIX,
    CostModel,
    Decision,
    DecisionEntry,
    DecisionLog,
    Held,
    KnownPrefix,
    Policy,
    PolicyState,
    RecentPrefixes,
    Redirect,
    Refusal,
    RoutedRequest,
    WorkerKey,
    choose,
    next_state,
    places_to_move_to,
)

MAX_PREFIX_SOURCES = 4
_KEY_TOKENS = 256


def routing_key(prompt_token_ids: Sequence[int], cache_salt: str) -> bytes:
    """Equal for prompts that begin equally; see `routing.choose`."""
    head = ",".join(map(str, prompt_token_ids[:_KEY_TOKENS]))
    return hashlib.blake2b(f"{cache_salt}\0{head}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Placer:
    """Places sequences. One per router."""

    def __init__(
        self,
        workers: Workers,
        policy: Policy,
        log: DecisionLog,
        clock: Callable[[], float],
        unix_clock: Callable[[], float],
    ) -> None:
        self.log = log
        self.answers = AnswerLengths()
        self._clock = clock
        self._unix_clock = unix_clock
        self._workers = workers
        self._policy = policy
        self._state = PolicyState()
        self._recent = RecentPrefixes()
        self._redirects = Redirects()
        self.on_redirect: Callable[[str], None] = lambda direction: None
        """Is told of each prompt that goes on elsewhere: by a `prefill` worker, or by the one that will `decode` it."""

    def place(
        self,
        ask: Ask,
        exclude: Collection[str],
        *,
        among: Collection[str] = (),
        attempt: int = 1,
        retried_after: str = "",
        numerics: str = "",
    ) -> Placement | Refusal:
        """Chooses workers. Nothing is counted before `sent`.

        `among`: these decode workers only, if there are any. `numerics`: of the worker that it was begun on, whose like
        are preferred."""
        known = self._workers.spaces(ask.order.model, ask.fingerprints, ask.order.adapter)
        spaces = {space.model_fingerprint: space for space in known}
        cost = CostModel(self._workers.rates(next(iter(spaces), "")))
        request = self._routed(ask, spaces, numerics)
        decision = choose(
            request,
            self._workers.decode_table(),
            self._workers.prefill_table(),
            exclude,
            among=among,
            policy=self._policy,
            state=self._state,
            cost=cost,
        )
        fingerprint = next(iter(spaces), "") if isinstance(decision, Refusal) else decision.decode.model_fingerprint
        prefix = request.prefix(fingerprint)
        self._note(ask, decision, cost, prefix, attempt=attempt, retried_after=retried_after)
        if isinstance(decision, Refusal):
            return decision
        return Placement(ask, decision, spaces[fingerprint])

    def _note(
        self,
        ask: Ask,
        outcome: Decision | Refusal,
        cost: CostModel,
        prefix: KnownPrefix = NO_PREFIX,
        *,
        attempt: int = 0,
        retried_after: str = "",
        redirect: Redirect[int] | None = None,
    ) -> None:
        self.log.add(
            DecisionEntry(
                tenant=ask.tenant,
                request_id=ask.request_id,
                index=ask.index,
                attempt=attempt,
                unix_s=self._unix_clock(),
                num_prompt_tokens=len(ask.prompt) + len(ask.order.resumed_token_ids),
                num_blocks=prefix.num_blocks,
                index_s=ask.blocks.index_s,
                held=dict(sorted(prefix.held.items(), key=lambda item: -item[1].num_blocks)[:MAX_CANDIDATES]),
                expected=dict(sorted(prefix.expected.items(), key=lambda item: -item[1])[:MAX_CANDIDATES]),
                outcome=outcome,
                rates=cost.rates,
                retried_after=retried_after,
                redirect=redirect,
            )
        )

    def _routed(self, ask: Ask, spaces: Mapping[str, BlockSpace], numerics: str) -> RoutedRequest:
        """What the choice may depend on. `spaces`: by fingerprint."""
        order = ask.order
        return RoutedRequest(
            model=order.model,
            num_prompt_tokens=len(ask.prompt) + len(order.resumed_token_ids),
            key=ask.key,
            prefixes={fingerprint: self._known(ask, space) for fingerprint, space in spaces.items()},
            numerics=numerics,
            has_begun=bool(order.resumed_token_ids),
            num_final_tokens=ask.num_final_tokens,
            adapter=order.adapter,
            fingerprints=spaces.keys(),
            objectives=ask.objectives_left(self._clock()),
            num_output_tokens=self.answers.expected(
                order.model, order.sampling.max_tokens - len(order.resumed_token_ids)
            ),
        )

    def places_to_move_to(self, ask: Ask, placement: Placement, num_tokens: int) -> Collection[str]:
        """Decode workers that could take a live sequence of so many tokens, with its blocks and at once; none: stay."""
        num_blocks = -(-num_tokens // placement.space.block_size)
        table, order = self._workers.decode_table(), ask.order
        candidates = [table.workers[row] for row in table.ready(order.model, order.adapter)]
        places = places_to_move_to(placement.decision.decode, candidates, order.model, num_blocks, ask.num_final_tokens)
        return [place.worker_id for place in places]

    def fill_order(self, order: pb.GenerateRequest, placement: Placement) -> None:
        """Names the prefill workers, the other holders of the prefix and the blocks' hashes in an order."""
        if placement.hashes:
            order.prompt_hashes.root = placement.space.root(order.cache_salt)
            order.prompt_hashes.block_size = placement.space.block_size
            order.prompt_hashes.hashes = pack_hashes(placement.hashes)
        # One that was deflected is told of no prefill worker: it computes all where it decodes.
        if not placement.decision.deflected:
            _name_targets(order.prefill_targets, placement.decision)
        holdings = {holding.holder_id: holding for holding in placement.blocks.holdings.get(placement.space, ())}
        for holder_id in placement.decision.sources[:MAX_PREFIX_SOURCES]:
            holding = holdings[holder_id]
            record = self._workers.registered((holder_id, holding.incarnation))
            if record is not None and record.kv_address:
                held = Held(holding.num_blocks, holding.num_per_tier)
                order.prefix_sources.add(
                    holder_id=holder_id,
                    incarnation=holding.incarnation,
                    kv_address=record.kv_address,
                    num_blocks=holding.num_blocks,
                    tier=held.slowest_tier,
                )

    def sent(self, placement: Placement, *, comes_with_blocks: bool = False) -> None:
        """The order is on its way: its prefill stands in front of later ones, and its prefix will be there.

        `comes_with_blocks`: nothing is expected to be computed.
        """
        if self._policy is Policy.ROUND_ROBIN:
            known = {record.worker_id for record in self._workers.records}
            self._state = next_state(self._state, placement.decision, known)
        num_tokens = 0 if comes_with_blocks else placement.decision.prefilled_by.num_computed_tokens
        placement.num_counted_tokens = num_tokens
        self._goes_to(placement)

    def look(self) -> None:
        """There is news of the fleet: a prompt may be sooner elsewhere."""
        if not self._redirects.is_due(self._clock()):
            return
        workers = self._workers
        model_fingerprint = self._redirects.model_fingerprint
        cost = CostModel(workers.rates(model_fingerprint))
        found = self._redirects.find(self._clock(), workers.decode_table(), workers.prefill_table(), cost)
        if found is None:
            return
        placement, redirect = found
        decision = redirected(placement.decision, redirect, workers.prefill_table())
        message = pb.RedirectRequest()
        if not decision.prefills_locally:
            _name_targets(message.prefill_targets, decision)
        self._redirects.forget(placement)
        if not placement.redirect(message):
            return
        self._workers.count_prefill(placement.prefill_key, -placement.num_counted_tokens)
        self._recent.forget(placement.prefill_key, placement.hashes)
        placement.decision, placement.num_counted_tokens = decision, redirect.num_left_tokens
        placement.num_redirects += 1
        self._goes_to(placement)
        self.on_redirect("decode" if decision.prefills_locally else "prefill")
        self._note(placement.ask, decision, cost, redirect=redirect)

    def _goes_to(self, placement: Placement) -> None:
        """Somebody computes its prompt from now on."""
        placement.sent_s = self._clock()
        self._workers.count_prefill(placement.prefill_key, placement.num_counted_tokens)
        self._remember(placement.prefill_key, placement)
        if self._policy is Policy.KV:  # the others have no costs to compare
            self._redirects.follow(placement)

    def prefilled(self, placement: Placement, usage: pb.Usage | None) -> None:
        """The first token is here. `usage` says, if it is known, who did the prefill in the end."""
        self.withdraw(placement)
        decode, expected = placement.decode_key, placement.prefill_key
        if usage is not None and usage.HasField("moved"):  # nobody has computed it
            self._remember(decode, placement)
            return
        done_by = expected[0]
        if usage is not None:
            done_by = decode[0] if usage.prefilled_locally else usage.prefill_worker_id
            if usage.HasField("prefill_rates"):
                self._workers.prefill_rates(usage.prefill_worker_id, usage.prefill_rates)
        if done_by == expected[0]:
            self._remember(expected, placement)
        else:
            self._recent.forget(expected, placement.hashes)
        # Where the first token was also the last, nothing was handed over.
        if done_by == decode[0] or usage is None or usage.num_transferred_blocks:
            self._remember(decode, placement)

    def withdraw(self, placement: Placement) -> None:
        """Note that its prefill has ended, or never will begin. Safe to call again."""
        self._redirects.forget(placement)
        num_tokens, placement.num_counted_tokens = placement.num_counted_tokens, 0
        self._workers.count_prefill(placement.prefill_key, -num_tokens)

    def _known(self, ask: Ask, space: BlockSpace) -> KnownPrefix:
        hashes = ask.blocks.hashes.get(space, ())
        # An entry of another incarnation is of a process that is no more.
        held = {
            holding.holder_id: Held(holding.num_blocks, holding.num_per_tier)
            for holding in ask.blocks.holdings.get(space, ())
            if self._workers.registered((holding.holder_id, holding.incarnation)) is not None
        }
        recent = self._recent.num_held(hashes, self._clock())
        expected = {key[0]: count for key, count in recent.items() if self._workers.registered(key) is not None}
        return KnownPrefix(space.block_size, len(hashes), held, expected)

    def _remember(self, worker: WorkerKey, placement: Placement) -> None:
        self._recent.add(worker, placement.hashes, self._clock())


def _name_targets(targets: RepeatedCompositeFieldContainer[pb.PrefillTarget], decision: Decision) -> None:
    for target in decision.prefill:
        targets.add(
            worker_id=target.worker_id,
            incarnation=target.incarnation,
            grpc_address=target.grpc_address,
            kv_address=target.kv_address,
        )
