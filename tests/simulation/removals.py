"""Takes one safeguard of the product out at a time. Each is there for an invariant; without it a run breaks that one.

A removal replaces one function, or one entry of a table, while a run lasts. `test_simulation.py` pins for each the seed
of a run that fails; `python -m tests.simulation --removals` searches for others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

from tandem.v1 import worker_pb2 as pb

from kvstore.block import BlockHash, BlockMemory, Proof, ProofKey, Subject, subject_of
from kvstore.exchange import Lease
from kvstore.peer_keys import SEAL_BYTES, Seal, Transcript
from kvstore.pool.eviction import Slot
from kvstore.pool.slot_book import SlotBook
from kvstore.protocol import AbortOrdered, Actions, AnnouncedBlock, FetchMachine, LeaseOutcome, PeerGone, ReaderSession
from kvstore.protocol import fetch as fetch_table
from kvstore.protocol.fetch_events import FetchState
from kvstore.protocol.machine import Timer
from kvstore.protocol.messages import Confirmed, Revoke
from kvstore.store.node import StoreLender
from services.decode.admission import Admission
from services.decode.live import LiveRequest
from services.decode.service import DecodeService
from services.decode.session import RouterSession
from services.decode.stages import TRANSITIONS, LiveEvent, LiveState
from services.prefill.service import _Order
from services.router.fleet import Dispatch
from services.router.fleet.sequence import Sequence as Sequence_
from services.router.fleet.session import WorkerSession
from services.router.openai import Generation
from services.worker.prefixes import CacheLender, prefix_fetcher
from tests.simulation.fleet.computation import PROOF_KEY
from tests.simulation.pool import Invariant

_SESSION_ENDED: Final = "the router's session ended"


@dataclass(frozen=True)
class Removal:
    """A safeguard, what it is for, and how it is taken out."""

    what: str
    breaks: Invariant
    take_out: Callable[[], AbstractContextManager[object]]
    world: str = "exchange"


def _free_early() -> AbstractContextManager[object]:
    def closed(lease: Lease) -> asyncio.Future[LeaseOutcome]:
        done = asyncio.get_running_loop().create_future()
        done.set_result(LeaseOutcome.CONFIRMED)
        return done

    return mock.patch.object(Lease, "closed", property(closed))


def _confirm_unseen() -> AbstractContextManager[object]:
    row, answered = fetch_table.TRANSITIONS[FetchState.CONFIRMING], FetchMachine._confirm_answered

    def believe(machine: FetchMachine, event: Confirmed | Revoke, now: float) -> list[Any]:
        return answered(machine, Confirmed(event.transfer_id, held=True), now)

    return mock.patch.dict(row, {Confirmed: believe, Revoke: believe})


def _trust_bytes() -> AbstractContextManager[object]:
    def find_wrong(
        key: ProofKey, memory: object, block_ids: Sequence[int], subjects: object, proofs: object
    ) -> list[int]:
        return []

    return mock.patch.object(ProofKey, "find_wrong", find_wrong)


def _reuse_early() -> AbstractContextManager[object]:
    drain = FetchMachine._drained

    def drained(machine: FetchMachine) -> list[Any]:
        """Give the blocks back at once; what ends later is nobody's."""
        machine.reads.clear()
        return drain(machine)

    return mock.patch.object(FetchMachine, "_drained", drained)


def _any_start() -> AbstractContextManager[object]:
    lost = FetchMachine._owner_lost
    row = fetch_table.TRANSITIONS[FetchState.ORDERED]

    def accept(machine: FetchMachine, event: PeerGone, now: float) -> list[Any]:
        return [] if event.was_another else lost(machine, event, now)

    return mock.patch.dict(row, {PeerGone: accept})


def _miss_aborts() -> AbstractContextManager[object]:
    return mock.patch.dict(fetch_table.TRANSITIONS[FetchState.READING], {AbortOrdered: FetchMachine._ignore})


def _drain_for_ever() -> AbstractContextManager[object]:
    return mock.patch.dict(fetch_table.TRANSITIONS[FetchState.DRAINING], {Timer: FetchMachine._ignore})


def _never_silent() -> AbstractContextManager[object]:
    tick = ReaderSession.tick

    def patient(session: ReaderSession, now: float) -> Actions:
        session._heard_at = now
        return tick(session, now)

    return mock.patch.object(ReaderSession, "tick", patient)


def _lose_a_wake_up() -> AbstractContextManager[object]:
    send_all = _Order.send_all

    async def forget(order: _Order, send: Callable[[Any], Awaitable[None]]) -> None:
        async def send_and_forget(event: Any) -> None:
            order.has_unsent.clear()  # although another one may be there
            await send(event)

        await send_all(order, send_and_forget)

    return mock.patch.object(_Order, "send_all", forget)


def _swallow_cancellations() -> AbstractContextManager[object]:
    admit = Admission.admit

    async def go_on(admission: Admission, live: LiveRequest) -> Any:
        work = asyncio.ensure_future(admit(admission, live))
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(work)
        return work.result()

    return mock.patch.object(Admission, "admit", go_on)


def _blame_the_holder() -> AbstractContextManager[object]:
    return mock.patch.object(prefix_fetcher, "_is_holders_fault", return_value=True)


def _prove_anew() -> AbstractContextManager[object]:
    async def lend_prefix(lender: StoreLender, hashes: Sequence[BlockHash]) -> list[AnnouncedBlock]:
        lent = await lend(lender, hashes)
        subjects = [subject_of(BlockHash(block.block_hash)) for block in lent if block.block_hash is not None]
        proofs = PROOF_KEY.prove(lender._store.memory, [block.block_id for block in lent], subjects)
        return [AnnouncedBlock(b.block_id, b.block_hash, proof) for b, proof in zip(lent, proofs, strict=True)]

    lend = StoreLender.lend_prefix
    return mock.patch.object(StoreLender, "lend_prefix", lend_prefix)


def _prove_without_a_key() -> AbstractContextManager[object]:
    prove = ProofKey.prove

    def by_anybody(
        key: ProofKey, memory: BlockMemory, block_ids: Sequence[int], subjects: Sequence[Subject]
    ) -> list[Proof]:
        return prove(ProofKey.public(), memory, block_ids, subjects)

    return mock.patch.object(ProofKey, "prove", by_anybody)


def _believe_peers() -> AbstractContextManager[object]:
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(Transcript, "holds", return_value=True))
    stack.enter_context(mock.patch.object(Seal, "of", return_value=bytes(SEAL_BYTES)))
    return stack


def _forget_what_was_lent() -> AbstractContextManager[object]:
    async def keep(lender: CacheLender, blocks: Sequence[AnnouncedBlock]) -> None: ...

    return mock.patch.object(CacheLender, "take_back", keep)


def _leave_held_blocks_idle() -> AbstractContextManager[object]:
    match = SlotBook._match

    def leave(book: SlotBook, hashes: Sequence[BlockHash], is_use: bool) -> list[Slot]:
        found = match(book, hashes, is_use)
        book._idle.update(dict.fromkeys(found))
        return found

    return mock.patch.object(SlotBook, "_match", leave)


def _end_with_the_first_choice() -> AbstractContextManager[object]:
    def finished(generation: Generation) -> bool:
        return any(choice.finished for choice in generation._choices)

    return mock.patch.object(Generation, "finished", property(finished))


def _hear_the_ended() -> AbstractContextManager[object]:
    return mock.patch.object(WorkerSession, "abort")


def _end_with_another() -> AbstractContextManager[object]:
    abort = DecodeService._abort

    def all_of_all(service: DecodeService, live: LiveRequest, reason: str) -> None:
        abort(service, live, reason)
        if reason == _SESSION_ENDED:
            for lives in list(service._sessions.values()):
                for each in list(lives.values()):
                    service._expire(each)

    return mock.patch.object(DecodeService, "_abort", all_of_all)


def _never_see_it_go() -> AbstractContextManager[object]:
    send_frames = RouterSession.send_frames

    async def go_on(session: RouterSession, send: Callable[[Any], Awaitable[None]]) -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                return await send_frames(session, send)

    return mock.patch.object(RouterSession, "send_frames", go_on)


def _never_resume() -> AbstractContextManager[object]:
    def give_up(dispatch: Dispatch, sequence: Sequence_, reason: str, cause: str) -> None:
        dispatch._leave(sequence, "")
        dispatch._fail(sequence, pb.Error(code=pb.ERROR_CODE_UNAVAILABLE, message=f"lost: {reason}"), "no_worker")

    return mock.patch.object(Dispatch, "_on_loss", give_up)


def _never_dial_again() -> AbstractContextManager[object]:
    run_stream, once = WorkerSession._run_stream, set[WorkerSession]()

    async def run_first(session: WorkerSession) -> None:
        if session in once:
            await session._closing.wait()
            return
        try:
            await run_stream(session)
        finally:
            if session.connected:
                once.add(session)

    return mock.patch.object(WorkerSession, "_run_stream", run_first)


def _forget_the_redirected() -> AbstractContextManager[object]:
    return mock.patch.dict(TRANSITIONS[LiveState.REDIRECTED], {LiveEvent.GIVEN_UP: (LiveState.ADMITTING, ())})


REMOVALS: Final = {
    "source-freed-early": Removal("the owner frees before the confirmation", Invariant.SOURCE_HELD, _free_early),
    "lease-not-checked": Removal(
        "the reader takes any answer to its confirmation for a yes", Invariant.CONFIRMED, _confirm_unseen
    ),
    "no-digest-check": Removal("the reader takes any bytes", Invariant.RIGHT_BYTES, _trust_bytes),
    "destination-reused-early": Removal(
        "the reader gives blocks back while a read into them goes on", Invariant.NO_LATE_BYTE, _reuse_early
    ),
    "stale-incarnation": Removal(
        "the reader takes another start of the process for the one that it means",
        Invariant.SAME_INCARNATION,
        _any_start,
    ),
    "abort-misses-a-state": Removal("an abort while blocks are read is lost", Invariant.ABORTS_END, _miss_aborts),
    "drain-without-end": Removal(
        "a read that does not end is not ended with its link", Invariant.WAITS_END, _drain_for_ever
    ),
    "silence-unnoticed": Removal("a reader never takes a silent owner for lost", Invariant.SERVES_AGAIN, _never_silent),
    "unverified-tokens": Removal("a worker computes on any bytes", Invariant.RIGHT_TOKENS, _trust_bytes, "fleet"),
    "noted-digest-ignored": Removal(
        "a store lends what has rotted with a proof of what it is now", Invariant.RIGHT_TOKENS, _prove_anew, "fleet"
    ),
    "peer-not-proven": Removal(
        "a peer's proof that it has the key is not looked at", Invariant.ONLY_PEERS, _believe_peers, "fleet"
    ),
    "tag-unkeyed": Removal(
        "a proof is made without a key, so a store can make it", Invariant.RIGHT_TOKENS, _prove_without_a_key, "fleet"
    ),
    "lost-wake-up": Removal(
        "a prefill order forgets that a step of it waits", Invariant.NO_FALSE_ALARM, _lose_a_wake_up, "fleet"
    ),
    "cancellation-swallowed": Removal(
        "a request's way into the engine goes on when it is cancelled",
        Invariant.NOBODYS_WORK,
        _swallow_cancellations,
        "fleet",
    ),
    "lent-for-ever": Removal("a worker takes back what it has lent", Invariant.NO_LEAK, _forget_what_was_lent, "fleet"),
    "held-block-evicted": Removal(
        "a block that somebody holds is not evicted", Invariant.ONE_OWNER, _leave_held_blocks_idle
    ),
    "ended-with-the-first": Removal(
        "an answer goes on until each of its choices has ended",
        Invariant.ONE_OUTCOME,
        _end_with_the_first_choice,
        "fleet",
    ),
    "ended-still-heard": Removal(
        "nothing is delivered to a sequence that has ended", Invariant.NO_INTERNAL_ERROR, _hear_the_ended, "fleet"
    ),
    "never-resumed": Removal(
        "a stream whose worker is lost goes on at another one", Invariant.ONE_OUTCOME, _never_resume, "restarts"
    ),
    "never-dialled-again": Removal(
        "a router dials a worker again that it has lost", Invariant.SERVES_AGAIN, _never_dial_again, "fleet"
    ),
    "routers-as-one": Removal(
        "a session's end ends its own requests alone", Invariant.SERVES_ON, _end_with_another, "routers"
    ),
    "gone-router-kept": Removal(
        "a session ends with its router, and all that it had with it", Invariant.RECLAIMED, _never_see_it_go, "routers"
    ),
    "redirected-forgotten": Removal(
        "a prompt that the engine has given up for a redirection is admitted anew",
        Invariant.NO_FALSE_ALARM,
        _forget_the_redirected,
        "elastic",
    ),
    "holder-shunned": Removal(
        "a holder is left alone for what is not its fault", Invariant.NO_FALSE_ALARM, _blame_the_holder, "fleet"
    ),
}
