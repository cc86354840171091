"""Follows the workers that the registry lists, and keeps a session with each decode worker.

A decode worker that leaves the registry gets no new requests, but keeps its session until its last one has ended: a
lost lease may only mean that Redis had a bad moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from tandem.v1 import worker_pb2 as pb

from kvstore.registry import Membership, WorkerRecord
from services.budgets import Role
from services.orders import Orders
from services.rates import GUESSED, Rates
from services.router.fleet.known_rates import ModelRates
from services.router.fleet.prefixes import BlockSpace
from services.router.fleet.rows import decode_candidate, prefill_candidate
from services.router.fleet.session import WorkerSession
from services.router.fleet.silence import Silence
from services.router.fleet.worker_load import rates_from_proto
from services.router.routing import DecodeCandidate, DecodeTable, PrefillCandidate, PrefillTable, WorkerKey

log = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 1.0
_PREFILL_WAIT_S = 30.0
_AGAIN_S = 0.5  # until a worker that refused is asked again


class Workers:
    """Follows the membership; owns the sessions and their tasks."""

    def __init__(
        self,
        membership: Membership,
        router_id: str,
        orders: Orders,
        clock: Callable[[], float],
        reconnect_max_s: float,
        serves: Callable[[WorkerRecord], bool] = lambda record: True,
        silence_timeout_s: float = 2.0,
    ) -> None:
        self.on_news: Callable[[], None] = lambda: None
        """Called when a worker may have room that it had not before."""
        self._membership = membership
        self._router_id = router_id
        self._orders = orders
        self._reconnect_max_s = reconnect_max_s
        self._serves = serves
        self._silence_timeout_s = silence_timeout_s
        self._clock = clock
        self._records: tuple[WorkerRecord, ...] = ()
        self._starting: tuple[WorkerRecord, ...] = ()
        self._registered: dict[WorkerKey, WorkerRecord] = {}
        self._listed: dict[WorkerKey, WorkerRecord] = {}
        self._by_id: dict[str, WorkerRecord] = {}
        self._prefilled: set[str] = set()  # fingerprints of those that have prefill workers
        self._spaces: dict[tuple[str, str], list[BlockSpace]] = {}  # by model and adapter
        self._decode_table: DecodeTable | None = None  # None: those of before are not true any more
        self._prefill_table: PrefillTable | None = None
        self._decode_rows: dict[WorkerKey, int] = {}
        self._prefill_rows: dict[WorkerKey, int] = {}
        self._news_of: set[WorkerKey] = set()  # workers whose rows are to be written anew
        self._known_rates: dict[str, ModelRates] = {}  # by model fingerprint
        self._sessions: dict[WorkerKey, WorkerSession] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._queued_tokens: dict[WorkerKey, int] = {}
        self._prefill_awaited_until_s: dict[str, float] = {}  # by model fingerprint
        self._prefill_rates: dict[str, Rates] = {}  # by worker id, as the last answer of that worker had them
        self._numerics: dict[str, set[str]] = {}  # of all so far, by model fingerprint
        self._news: asyncio.Event | None = None  # that somebody waits for
        self._closed = False

    def start(self) -> None:
        """Reads the membership and follows it from now on. Call it in the event loop."""
        self._membership.on_change(self._follow)
        self._follow(self._membership.snapshot())

    def _follow(self, snapshot: tuple[WorkerRecord, ...]) -> None:
        """Opens sessions to new decode workers, ends those that are gone and done."""
        self._registered = {record.key: record for record in snapshot}
        self._records = tuple(record for record in snapshot if self._serves(record))
        for record in snapshot:
            self._numerics.setdefault(record.model_fingerprint, set()).add(record.numerics)
        self._starting = tuple(record for record in self._membership.starting() if self._serves(record))
        listed = self._listed = {record.key: record for record in self._records}
        self._by_id = {record.worker_id: record for record in reversed(self._records)}
        self._prefilled = {record.model_fingerprint for record in self._records if record.prefills}
        self._decode_table, self._prefill_table = None, None
        self._decode_rows, self._prefill_rows = {}, {}
        self._spaces.clear()
        self._known_rates.clear()
        for key, record in listed.items():
            if not record.decodes:
                continue
            if key in self._sessions:
                self._sessions[key].record = record
            else:
                self._open(key, record)
        for key in list(self._sessions):
            if key not in listed:
                self.retire_if_idle(self._sessions[key])
        self._queued_tokens = {key: count for key, count in self._queued_tokens.items() if key in listed}
        self._await_prefill()
        worker_ids = {worker_id for worker_id, _ in listed}
        self._prefill_rates = {each: rates for each, rates in self._prefill_rates.items() if each in worker_ids}
        self._note_news()

    async def changed(self, deadline_s: float) -> bool:
        """Waits until other decode workers can be given work than now, or, where some can, a moment for them to think
        again; False at the deadline, and at the end."""
        before, left_s = self._able(), deadline_s - self._clock()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(left_s, _AGAIN_S) if before else left_s):
                while self._able() == before and not self._closed:
                    self._news = self._news or asyncio.Event()
                    await self._news.wait()
        return not self._closed and (self._able() != before or self._clock() < deadline_s)

    def _able(self) -> set[WorkerKey]:
        return {
            record.key
            for record, session in self._decode_sessions()
            if session.connected and not (record.draining or session.load.draining)
        }

    def _note_news(self) -> None:
        if self._news is not None:
            self._news.set()
            self._news = None
        self.on_news()

    def _await_prefill(self) -> None:
        until_s = self._clock() + _PREFILL_WAIT_S
        self._prefill_awaited_until_s = {
            model: -math.inf if model in self._prefilled else self._prefill_awaited_until_s.get(model, until_s)
            for model in {record.model_fingerprint for record in self._records}
        }

    def awaits_prefill(self, worker: DecodeCandidate) -> bool:
        """Whether a decode worker that expects prefill workers still waits for the first.

        A fleet starts in any order; until then decode workers would prefill all prompts. False when it is colocated,
        once a prefill worker of the model was registered (gone or not), and half a minute after the model came.
        """
        until_s = self._prefill_awaited_until_s.get(worker.model_fingerprint, -math.inf)
        return not worker.colocated and self._clock() < until_s

    def retire_if_idle(self, session: WorkerSession) -> None:
        """Closes the session of a worker that has left the registry, once nothing runs on it any more."""
        key = session.record.key
        if key not in self._listed and session.num_live == 0 and self._sessions.get(key) is session:
            del self._sessions[key]
            session.close()

    @property
    def records(self) -> tuple[WorkerRecord, ...]:
        """The registered workers that serve a model of ours."""
        return self._records

    @property
    def starting(self) -> tuple[WorkerRecord, ...]:
        """The workers of a model of ours that start: they are shown, and get nothing to do."""
        return self._starting

    @property
    def num_sessions_up(self) -> int:
        return sum(session.connected for session in self._sessions.values())

    def session(self, worker_id: str, incarnation: str) -> WorkerSession:
        """The session with a candidate of the current snapshot."""
        return self._sessions[worker_id, incarnation]

    def session_of(self, record: WorkerRecord) -> WorkerSession | None:
        """The session with a registered worker; None where it has none."""
        return self._sessions.get(record.key)

    def roles_now(self) -> list[tuple[str, Role]]:
        """The elastic workers that are connected, by id, with the role that each says it has."""
        pairs = self._decode_sessions()
        return [(record.worker_id, each.role) for record, each in pairs if record.prefills and each.connected]

    def num_queued_tokens(self, record: WorkerRecord) -> int:
        """Prompt tokens that this router expects the worker to compute."""
        return self._queued_tokens.get(record.key, 0)

    def rates_of(self, record: WorkerRecord) -> Rates:
        """The speed of a prefill worker, as it last said; the guess before that."""
        return self._prefill_rates.get(record.worker_id, GUESSED)

    def decode_candidates(self) -> list[DecodeCandidate]:
        """All, as a request would see them: one that should have said something is not connected, where others of its
        model have."""
        found = [self._decode_candidate(record, session) for record, session in self._decode_sessions()]
        heard = {each.model_fingerprint for each in found if each.connected and not each.is_suspect}
        return [
            replace(each, connected=False) if each.is_suspect and each.model_fingerprint in heard else each
            for each in found
        ]

    def prefill_candidates(self) -> list[PrefillCandidate]:
        """All of them."""
        return [self._prefill_candidate(record) for record in self._records if record.prefills]

    def decode_table(self) -> DecodeTable:
        """The decode workers as they are now."""
        if self._decode_table is None:
            pairs = list(self._decode_sessions())
            self._decode_table = DecodeTable([self._decode_candidate(*pair) for pair in pairs])
            self._decode_rows = {record.key: row for row, (record, _) in enumerate(pairs)}
        self._take_news()
        return self._decode_table

    def _take_news(self) -> None:
        """Write the rows of those anew who have said something, or were given something: an elastic one has two."""
        for key in self._news_of:
            record, session = self._listed.get(key), self._sessions.get(key)
            if record is None:
                continue
            row = self._prefill_rows.get(key)
            if self._prefill_table is not None and row is not None:
                self._prefill_table.put(row, self._prefill_candidate(record))
            row = self._decode_rows.get(key)
            if self._decode_table is not None and row is not None and session is not None:
                before = self._decode_table.workers[row].bending.role
                self._decode_table.put(row, self._decode_candidate(record, session))
                if before != self._decode_table.workers[row].bending.role:
                    self._known_rates.pop(record.model_fingerprint, None)  # others know now what prompts cost
                elif record.model_fingerprint in self._known_rates:
                    self._put_rates(self._known_rates[record.model_fingerprint], record, session)
        self._news_of.clear()

    def prefill_table(self) -> PrefillTable:
        """The prefill workers as they are now."""
        if self._prefill_table is None:
            records = [record for record in self._records if record.prefills]
            self._prefill_table = PrefillTable(list(map(self._prefill_candidate, records)))
            self._prefill_rows = {record.key: row for row, record in enumerate(records)}
        self._take_news()
        return self._prefill_table

    def _decode_candidate(self, record: WorkerRecord, session: WorkerSession) -> DecodeCandidate:
        return decode_candidate(record, session, self._queued_tokens.get(record.key, 0))

    def _prefill_candidate(self, record: WorkerRecord) -> PrefillCandidate:
        return prefill_candidate(record, self._sessions.get(record.key), self._queued_tokens.get(record.key, 0))

    def spaces(self, model: str, fingerprints: Collection[str], adapter: str) -> list[BlockSpace]:
        """The block spaces of the workers that serve the model in one of these versions; usually one."""
        return [space for space in self._all_spaces(model, adapter) if space.model_fingerprint in fingerprints]

    def fingerprint(self, model: str) -> str:
        """Returns that of a worker that serves the model; empty where none does."""
        spaces = self._all_spaces(model, "")
        return spaces[0].model_fingerprint if spaces else ""

    def _all_spaces(self, model: str, adapter: str) -> list[BlockSpace]:
        known = self._spaces.get((model, adapter))
        if known is None:
            of_records = (
                BlockSpace(record.model_fingerprint, record.block_size, adapter)
                for record in self._records
                if model in record.model_names and (not adapter or adapter in record.adapters)
            )
            known = list(dict.fromkeys(of_records))
            if known:  # of what nobody serves there is no end
                self._spaces[model, adapter] = known
        return known

    def numerics(self, worker_id: str) -> str:
        """Returns the name of a worker's arithmetic; empty where it says none, or is not there any more."""
        record = self._by_id.get(worker_id)
        return record.numerics if record is not None else ""

    def numerics_of_all(self, model_fingerprint: str) -> Collection[str]:
        """The names of all, gone ones too, who may have made what lies in this model's caches.

        Among them the empty one where there was a store node: it holds what it was given, perhaps before our time.
        """
        return self._numerics.get(model_fingerprint, ())

    def may_have_made(self, model_fingerprint: str, usage: pb.Usage | None) -> set[str]:
        """The numerics of all but the decode worker who may have made the KV that a sequence has begun with.

        To be noted at once: they may be gone later. What was found in a cache, there or where it was fetched from, may
        be of anybody's making.
        """
        if usage is None:
            return {""}
        names = {self.numerics(usage.prefill_worker_id)} if usage.prefill_worker_id else set()
        if usage.num_cached_tokens or usage.fetched:
            names.update(self.numerics_of_all(model_fingerprint))
        return names

    def prefill_rates(self, worker_id: str, rates: pb.Rates) -> None:
        """A prefill worker has said how fast it is, with the answer to one of our prompts. An elastic one says it in
        its frames."""
        record = self._by_id.get(worker_id)
        if record is not None and record.prefills and not record.decodes:
            self._prefill_rates[worker_id] = known = rates_from_proto(rates)
            if record.model_fingerprint in self._known_rates:
                self._known_rates[record.model_fingerprint].prompts.put(worker_id, known)

    def rates(self, model_fingerprint: str) -> Rates:
        """Returns the speed of the workers that compute this model's prompts, prefill, else decode workers; where they
        are elastic, of streams that of those who decode."""
        self.decode_table()  # what sessions have said since
        known = self._known_rates.get(model_fingerprint)
        if known is None:
            known = self._known_rates[model_fingerprint] = ModelRates()
            for worker_id, rates in self._prefill_rates.items():
                if self._by_id[worker_id].model_fingerprint == model_fingerprint:
                    known.prompts.put(worker_id, rates)
            for record, session in self._decode_sessions():
                if record.model_fingerprint == model_fingerprint:
                    self._put_rates(known, record, session)
        return known.mean()

    def _put_rates(self, known: ModelRates, record: WorkerRecord, session: WorkerSession) -> None:
        if record.prefills and session.role == "decode":
            known.put_streams(record.worker_id, session.rates)
        elif record.prefills or record.colocated or record.model_fingerprint not in self._prefilled:
            known.prompts.put(record.worker_id, session.rates)

    def registered(self, worker: WorkerKey) -> WorkerRecord | None:
        """The registry's record of a holder of blocks, whatever it serves; None if this incarnation is not there."""
        return self._registered.get(worker)

    def count_prefill(self, worker: WorkerKey, num_tokens: int) -> None:
        """Adds prompt tokens to (or, negative, takes them from) what this router expects the worker to compute."""
        count = self._queued_tokens.pop(worker, 0) + num_tokens
        if count > 0:
            self._queued_tokens[worker] = count
        self._news_of.add(worker)
        if num_tokens < 0:
            self._note_news()

    async def close(self) -> None:
        """Ends all sessions; what still runs on them is lost."""
        self._closed = True
        for session in self._sessions.values():
            session.close()
        tasks = list(self._tasks)
        if tasks:
            # One that waits for a worker's first frame does not look up before its deadline.
            _, late = await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
            for task in late:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # a crash was logged when it happened
        self._note_news()

    def _decode_sessions(self) -> Iterable[tuple[WorkerRecord, WorkerSession]]:
        for record in self._records:
            session = self._sessions.get(record.key)
            if session is not None:
                yield record, session

    def _open(self, key: WorkerKey, record: WorkerRecord) -> None:
        silence = Silence(self._silence_timeout_s)
        session = WorkerSession(
            record,
            self._router_id,
            self._orders,
            self._reconnect_max_s,
            silence,
            self._note_news,
            lambda: self._news_of.add(key),
        )
        self._sessions[key] = session
        task = asyncio.create_task(session.run(), name=f"session with {record.worker_id}")
        self._tasks.add(task)
        task.add_done_callback(self._on_session_ended)

    def _on_session_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A bug of ours: the worker stays unused until its next incarnation, and the log says why.
            log.error("the %s crashed", task.get_name(), exc_info=error)
