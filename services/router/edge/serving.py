"""The generating endpoints as ASGI applications: read, plan, admit, generate, answer whole or as a stream.

One task serves one HTTP request from its first byte to its last. A client that goes away, at any point, cancels it;
`Generation.close` in a `finally` then ends every sequence at its worker.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from services.http_server import DIRECT_BODY
from services.lifecycle import Event, Timeline
from services.logs import request_scope
from services.router import sse
from services.router.admission import Admission
from services.router.config import RouterConfig
from services.router.edge.access import AccessRecord
from services.router.edge.client import Client, client_name
from services.router.edge.deadlines import Deadlines
from services.router.edge.entrance import Visit
from services.router.edge.http import FAILED, header, request_id_of, send_error, send_pieces
from services.router.edge.limits import Limits
from services.router.edge.memory import Holding, RequestMemory
from services.router.edge.stopping import Stopping, Whose
from services.router.errors import ApiError, ClientDisconnected, internal
from services.router.finished import Account, OnFinished
from services.router.fleet import Ask, Budget, Dispatch, Placer, PrefixFinder, Workers, routing_key
from services.router.metrics import RouterMetrics
from services.router.objectives import ObjectiveTable
from services.router.openai import (
    Count,
    Delta,
    GenerateBody,
    Generation,
    GenerationPlan,
    Renderer,
    SizeLimits,
    check_sizes,
)
from services.router.processes import Member
from services.router.roles import Controller
from services.router.sharing import Shares
from services.router.tenants import name_of
from services.router.text import ClientPool, ModelDirectory, ServedModel, TokenizerPool

log = logging.getLogger(__name__)

# How long a client may take to read the error that ends its request.
_LAST_WORDS_TIMEOUT_S = 2.0
# Of a stream, what is made before its client is waited for.
_EVENTS_AT_ONCE_BYTES = 1 << 18
_RECEIPT_HEADER = b"x-tandem-receipt"


@dataclass(frozen=True)
class RouterParts:
    """The parts that the endpoints work with. `main` builds, owns and closes them."""

    config: RouterConfig
    models: ModelDirectory
    workers: Workers
    pool: TokenizerPool
    memory: RequestMemory
    admission: Admission
    metrics: RouterMetrics
    prefixes: PrefixFinder
    placer: Placer
    shares: Shares
    objectives: ObjectiveTable
    limits: Limits
    on_arrived: Callable[[str, int, int], None]
    """Is told a request's model, its sequences and the tokens of its prompts, whatever becomes of it."""
    on_finished: OnFinished
    """Is told what each sequence's client got."""
    controller: Controller
    clock: Callable[[], float]
    unix_clock: Callable[[], float]
    siblings: Member | None = None
    """The other processes of this router; None: it has one."""
    stopping: Stopping = field(default_factory=Stopping)

    @contextmanager
    def client(self, scope: sse.Message) -> Iterator[Client]:
        """Whose request it is; what it holds is given back at the end."""
        name = client_name(scope)
        with self.memory.hold(name) as memory:
            yield Client(name, self.pool.of(name), memory, self.config.max_body_bytes)

    def deadline(
        self, deadlines: Deadlines | None = None, whose: Whose | None = None
    ) -> AbstractAsyncContextManager[None]:
        """Ends what runs under it in time, with an ApiError. None: as the settings say, from now on. `whose`: what can
        be aborted."""
        now_s = self.clock()
        deadlines = deadlines or Deadlines.of_settings(self.config, now_s)
        return self.stopping.deadline(deadlines.left_s(now_s), deadlines.total_s, whose)


_Answer = list[bytes | bytearray] | None
"""In pieces, each of which is as large as it is; None where it was streamed."""
B = TypeVar("B", bound=GenerateBody)
Plan = Callable[[B, ServedModel, RouterConfig, str, ClientPool], Awaitable[GenerationPlan]]
"""Checks and tokenizes a body. Raises ApiError."""


class GenerateEndpoint(Generic[B]):
    """An ASGI application for one of the two."""

    def __init__(self, parts: RouterParts, kind: type[B], plan: Plan[B], renderer: type[Renderer]) -> None:
        self._parts = parts
        self._kind = kind
        self._plan = plan
        self._renderer = renderer

    async def __call__(self, scope: sse.Message, receive: sse.Receive, send: sse.Send) -> None:
        timeline = Timeline(self._parts.unix_clock)
        timeline.mark(Event.ARRIVED)
        access: AccessRecord = scope["state"]["access"]
        stream = sse.EventStream(send, scope.get("extensions", {}).get(DIRECT_BODY, {}).get("body"))
        try:
            try:
                with self._parts.client(scope) as client:
                    async with client.body(scope, receive, self._kind, self._check_sizes) as body:
                        if body.receipt is None:
                            body.receipt = header(scope, _RECEIPT_HEADER) == "1"
                        request_id = request_id_of(scope, body.request_id)
                        with request_scope(request_id):
                            model = self._parts.models.get(body.model)
                            deadlines = Deadlines.of(scope, self._parts.config, access.started_s)
                            visit = Visit.of(
                                scope,
                                self._parts.shares,
                                deadlines,
                                self._parts.clock,
                                client.name,
                                model.name,
                                body.priority,
                                self._parts.objectives,
                                access.started_s,
                            )
                            answer = await self._serve(body, request_id, model, client, visit, timeline, stream, access)
                            if answer is not None:
                                await send_pieces(send, answer)
            except ApiError as error:
                await self._fail(error, stream, send)
                access.failed(error)
            except ClientDisconnected:
                raise
            except Exception:
                log.exception("the request crashed")
                await self._fail(internal(FAILED), stream, send)
                access.failed(internal(FAILED))
        except ClientDisconnected:
            self._parts.metrics.disconnects.inc()
            access.left()

    def _check_sizes(self, content: bytearray) -> Count:
        def limits(name: str | None) -> SizeLimits:
            model = self._parts.models.get(name)
            return SizeLimits(model.max_model_len, model.tokenizer.max_chars_per_token)

        return check_sizes(content, limits, self._parts.config.max_sequences_per_request)

    async def _fail(self, error: ApiError, stream: sse.EventStream, send: sse.Send) -> None:
        self._parts.metrics.count_error(error.status)
        try:
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT_S):
                if not stream.started:
                    await send_error(send, error)
                else:
                    await stream.end(sse.error_event(error))
        except TimeoutError:  # it does not read any more
            raise ClientDisconnected from error

    async def _serve(
        self,
        body: B,
        request_id: str,
        model: ServedModel,
        client: Client,
        visit: Visit,
        timeline: Timeline,
        stream: sse.EventStream,
        access: AccessRecord,
    ) -> _Answer:
        """The answer, unless it was streamed."""
        async with self._parts.deadline(visit.deadlines, (name_of(visit.tenant), request_id)):
            parts, config = self._parts, self._parts.config
            visit.check_delay(parts.admission)  # before anything is spent on it, its prompt's length unknown
            plan = await self._plan(body, model, config, request_id, client.pool)
            body.drop_input()
            client.memory.settle(plan.num_bytes)
            client.memory.note_sequences(plan.num_sequences)
            timeline.mark(Event.TOKENIZED)
            parts.on_arrived(plan.model.name, plan.num_sequences, sum(map(len, plan.prompts)))
            async with visit.room(plan, parts.admission, parts.limits) as (room, spent):
                dispatch = Dispatch(
                    parts.workers,
                    parts.placer,
                    parts.prefixes,
                    parts.metrics,
                    room,
                    await self._find_prefixes(plan, visit),
                    Budget(config.max_attempts, config.max_worker_deaths, config.resume_wait_s),
                    parts.clock,
                    parts.unix_clock,
                )
                metrics = parts.metrics.for_model(plan.model.name)
                account = Account(name_of(visit.tenant), visit.applicant.priority, visit.objectives, parts.on_finished)
                generation = Generation(plan, dispatch, metrics, timeline, account)
                try:
                    return await self._generate(generation, client.memory, stream)
                finally:
                    access.facts = generation.facts
                    usage = generation.usage()
                    spent.num_tokens = usage.num_prompt_tokens + usage.num_generated_tokens

    async def _find_prefixes(self, plan: GenerationPlan, visit: Visit) -> Callable[[int], Ask]:
        """Makes a sequence's order, by its index, with all that placing it may depend on."""
        parts, request, tenant = self._parts, plan.request, visit.tenant
        cache_salt = request.body.cache_salt or ""
        if tenant is not None and parts.config.cache_sharing == "tenant":
            cache_salt = tenant.salt(cache_salt)
        # A prompt whose own log probabilities are wanted is computed afresh, whoever holds it.
        reuses = not request.sampling.HasField("prompt_logprobs")
        versions = plan.model.fingerprints
        spaces = parts.workers.spaces(plan.model.name, versions, plan.model.adapter) if reuses else []
        blocks = await parts.prefixes.find(plan.prompts, cache_salt, spaces)
        num_prompt_tokens = parts.metrics.for_model(plan.model.name).prompt_tokens
        objectives, everybody = visit.objectives, parts.objectives.everybody

        def make_ask(index: int) -> Ask:
            prompt, choice = divmod(index, request.body.n)
            if choice == 0:
                num_prompt_tokens.inc(len(plan.prompts[prompt]))
            order = plan.order(index, visit.left_s or 0.0, cache_salt)
            order.priority = visit.applicant.priority
            if objectives.tpot_s < everybody.tpot_s:
                order.tpot_objective_s = objectives.tpot_s
            key = routing_key(plan.prompts[prompt], cache_salt)
            return Ask(
                name_of(tenant),
                plan.request_id,
                index,
                order,
                plan.prompts[prompt],
                plan.shared_lists,
                versions,
                blocks[prompt],
                key,
                objectives,
                visit.arrived_s,
            )

        return make_ask

    async def _generate(self, generation: Generation, memory: Holding, stream: sse.EventStream) -> _Answer:
        renderer, answer = self._renderer(generation, int(self._parts.unix_clock())), None
        try:
            generation.start()
            if generation.plan.request.body.stream:
                await _stream(generation, renderer, stream, self._parts.config.sse_keepalive_s)
            else:
                answer = await _collect(generation, renderer, memory)
        except BaseException as error:
            generation.close(error)
            raise
        generation.close(None)
        return answer


async def _collect(generation: Generation, renderer: Renderer, memory: Holding) -> list[bytes | bytearray]:
    whole = [Delta(index, token_ids=array("I")) for index in range(generation.plan.num_sequences)]
    while not generation.finished:
        for delta in await generation.deltas():
            await renderer.show_logprobs(delta)
            memory.add(delta.num_bytes)
            whole[delta.index].extend(delta)
    return renderer.response(whole)


async def _stream(generation: Generation, renderer: Renderer, stream: sse.EventStream, keepalive_s: float) -> None:
    # The response starts with the first news, so that a refusal by the workers is still a proper HTTP error.
    events = renderer.opening()
    if not generation.plan.wants_logprobs:
        generation.show_at_once(lambda: stream.is_free, lambda delta: stream.write_now(renderer.event(delta)))
    while True:
        deltas = await generation.deltas(keepalive_s)
        for delta in deltas:
            await renderer.show_logprobs(delta)
            events += renderer.event(delta)
            if len(events) > _EVENTS_AT_ONCE_BYTES:
                await stream.write(events)
                events = b""
        if not deltas:
            events += sse.KEEP_ALIVE
        if generation.finished:
            break
        if events:
            await stream.write(events)
        events = b""
    await stream.end(events + renderer.last_event() + sse.DONE)
