"""What a run of the fleet looks at in the product, and the clocks and names that nobody hands down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from unittest import mock

from kvstore.block import BlockHash
from services.decode.in_engine import InEngine
from services.decode.live import LiveRequest
from services.engine.api import Request
from services.router.fleet import session
from services.router.text import models
from services.worker.prefixes import HostPrefixes, Shunned
from tests.simulation.fleet import elastic
from tests.simulation.fleet.redis_host import seeded_clients
from tests.simulation.fleet.wishes import model_files
from tests.simulation.ledger import listening
from tests.simulation.pool import Invariant
from tests.states.rows import seeing_rows

if TYPE_CHECKING:
    from tests.simulation.fleet.world import FleetWorld


@contextlib.contextmanager
def watching(world: FleetWorld) -> Iterator[None]:
    """See what the product does where it matters, and have it go by the loop's time."""
    restore = HostPrefixes._restore

    async def restored(prefixes: HostPrefixes, first: BlockHash, hashes: Sequence[BlockHash]) -> int:
        num_blocks = await restore(prefixes, first, hashes)
        if num_blocks:
            world.reach("brought back from the host tier")
        return num_blocks

    shun = Shunned.add
    enter, drop = InEngine.enter, InEngine.drop
    gone: dict[int, LiveRequest] = {}  # kept, so that no number is given out twice

    def entered(those: InEngine, live: LiveRequest, request: Request) -> None:
        world.judge(Invariant.NOBODYS_WORK)
        if id(live) in gone:
            world.report(Invariant.NOBODYS_WORK, f"request {live.order.request_id} enters after its end")
        enter(those, live, request)

    def left(those: InEngine, live: LiveRequest) -> None:
        gone[id(live)] = live
        drop(those, live)

    def shunned(those: Shunned, name: str) -> None:
        world.alarm(f"shunned: {name} by {world.loop.process.name}", name)
        shun(those, name)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Shunned, "add", shunned))
        stack.enter_context(mock.patch.object(HostPrefixes, "_restore", restored))
        stack.enter_context(mock.patch.object(InEngine, "enter", entered))
        stack.enter_context(mock.patch.object(InEngine, "drop", left))
        stack.enter_context(mock.patch.object(models, "load_model_files", return_value=model_files()))
        stack.enter_context(mock.patch.object(session, "random", world.plan.stream("backoff")))
        stack.enter_context(seeded_clients(world))
        if world.plan.world == "elastic":
            stack.enter_context(elastic.watching(world))
        stack.enter_context(seeing_rows(lambda row: world.transitions.update((row,))))
        stack.enter_context(listening(world, ("kvstore", "services"), world.hear))
        yield
