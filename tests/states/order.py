"""A prefill worker around one order, as plain values: its engine, lease, call and clock. The table is the product's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.prefill.order import TRANSITIONS, OrderAction, OrderEvent, OrderState
from tests.states.explore import Step
from tests.states.told import Told

_E = OrderEvent
MAX_CHUNKS = 2


@dataclass
class OrderModel(Told):
    """One order. Commands to the engine's thread, and what that reports, arrive in order."""

    TABLE = TRANSITIONS
    BROKEN = _E.BROKEN

    state: OrderState = OrderState.PREPARING
    preparation: str = "running"  # cancelled, done, refused; told
    to_engine: tuple[str, ...] = ()
    engine: str = "without it"  # queued, computing, over
    to_loop: tuple[OrderEvent, ...] = ()
    num_chunks: int = 0
    lease: str = "none"  # open, closed; told
    call: str = "open"  # ended
    is_timed: bool = True
    num_last_events: int = 0
    is_pinned: bool = False
    is_settled: bool = False
    stops_left: int = 1
    breaks_left: int = 1
    lends: bool = True
    breaks: bool = False

    # ---- what may happen ----

    def steps(self) -> Iterator[Step]:
        if self.preparation == "running":
            yield Step("prepare", ("done",), must=False)
            yield Step("prepare", ("refused",), must=False)
        elif self.preparation != "told":
            yield Step("hear_of_preparation")
        if self.to_engine:
            yield Step("command")
            if self.to_engine[0] == "submit":
                yield Step("refuse")
        elif self.engine == "queued":
            yield Step("begin", must=False)
        elif self.engine == "computing":
            yield Step("compute", must=False)
            yield Step("compute_last", must=False)
            yield Step("compute_no_token", must=False)
        if self.to_loop:
            yield Step("report")
            if self.to_loop[0] is _E.BEGUN:
                yield Step("report_without_reader")
            if self.breaks_left and self.to_loop[0] in (_E.CHUNK, _E.LAST_CHUNK):
                yield Step("report_and_break", must=False)
        if self.lease == "open":
            yield Step("close_lease")  # it expires, if nothing else happens
        elif self.lease == "closed":
            yield Step("hear_of_lease")
        if self.call == "open":
            yield Step("hang_up", must=False)
            if self.num_last_events:
                yield Step("end_call")
            if self.stops_left:
                yield Step("stop", must=False)
        if self.is_timed:
            yield Step("expire")

    def prepare(self, how: str) -> None:
        self.preparation = how

    def hear_of_preparation(self) -> None:
        how, self.preparation = self.preparation, "told"
        self._tell(_E.PREPARED if how == "done" else _E.REFUSED)

    def command(self) -> None:
        command, self.to_engine = self.to_engine[0], self.to_engine[1:]
        if command == "submit":
            self.engine = "queued"
        elif self.engine in ("queued", "computing"):
            self.engine = "over"
        if command == "settle":
            assert self.lease in ("none", "told"), "blocks go back while they are lent"
            self.is_pinned = False

    def refuse(self) -> None:
        self.to_engine, self.engine = self.to_engine[1:], "over"
        self.to_loop += (_E.REFUSED,)

    def begin(self) -> None:
        self.engine = "computing"
        self.to_loop += (_E.BEGUN,)

    def compute(self) -> None:
        self.num_chunks = min(self.num_chunks + 1, MAX_CHUNKS)
        if self.num_chunks < MAX_CHUNKS:
            self.to_loop += (_E.CHUNK,)
            self.is_pinned = True

    def compute_last(self) -> None:
        self.engine, self.is_pinned = "over", True
        self.to_loop += (_E.LAST_CHUNK,)

    def compute_no_token(self) -> None:
        self.engine = "over"
        self.to_loop += (_E.NO_TOKEN,)

    def report(self) -> None:
        event, self.to_loop = self.to_loop[0], self.to_loop[1:]
        self._tell(event)

    def report_without_reader(self) -> None:
        self.lends = False
        self.report()
        self.lends = True

    def close_lease(self) -> None:
        self.lease = "closed"

    def hear_of_lease(self) -> None:
        self.lease = "told"
        self._tell(_E.LEASE_CLOSED)

    def end_call(self) -> None:
        self.call, self.is_timed = "ended", False
        self._tell(_E.CALL_ENDED)

    def hang_up(self) -> None:
        self.call, self.is_timed = "ended", False
        self._tell(_E.HUNG_UP)

    def stop(self) -> None:
        self.stops_left -= 1
        self._tell(_E.STOPPED)

    def expire(self) -> None:
        self.is_timed = False
        self._tell(_E.EXPIRED)

    # ---- what the service does ----

    def _do(self, action: OrderAction) -> None:
        match action:
            case OrderAction.CANCEL:
                assert self.preparation != "told", "a preparation that has ended is cancelled"
                if self.preparation == "running":
                    self.preparation = "cancelled"
            case OrderAction.SUBMIT:
                self.to_engine += ("submit",)
            case OrderAction.LEND if self.lends:
                self.lease = "open"
            case OrderAction.LEND:
                self._tell(_E.LEASE_CLOSED)
            case OrderAction.ANNOUNCE:
                assert self.lease != "none", "blocks of no lease are announced"
                self._break()
            case OrderAction.FINISH | OrderAction.FAIL:
                self.num_last_events += 1
                assert self.num_last_events == 1, "two last events"
                assert self.call == "open", "the caller has gone"
                self.is_timed = False
            case OrderAction.REVOKE:
                self.to_engine += ("abort",)
                if self.lease == "open":
                    self.lease = "closed"
            case OrderAction.SETTLE:
                assert not self.is_settled, "settled twice"
                self.is_settled = True
                self.to_engine += ("settle",)

    def why_not_at_rest(self) -> str:
        if self.state is not OrderState.SETTLED:
            # Nobody waits for it any less: it computes, or waits for room, and its caller listens.
            is_under_way = self.call == "open" and not self.is_timed and not self.num_last_events
            return "" if is_under_way else f"it is {self.state.name}"
        left = {
            "pinned blocks": self.is_pinned,
            "a place in the engine": self.engine in ("queued", "computing"),
            "an open lease": self.lease in ("open", "closed"),
            "a call": self.call == "open",
        }
        return ", ".join(what for what, is_left in left.items() if is_left)
