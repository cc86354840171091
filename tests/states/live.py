"""A decode worker around one live request, as plain values: admission, engine, router. The table is the product's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.decode.stages import TRANSITIONS, LiveAction, LiveEvent, LiveState
from tests.states.explore import Step
from tests.states.told import Told

_E = LiveEvent
_MAX_NEWS = 2
_IN_ENGINE = ("waiting", "prefilling", "decoding")


@dataclass
class LiveModel(Told):
    """One request. Commands to the engine's thread, and what that reports, arrive in order."""

    TABLE = TRANSITIONS
    BROKEN = _E.BROKEN

    state: LiveState = LiveState.ADMITTING
    admission: str = "comes"  # enters, joins: it waits for the engine; done, failed, cancelled; over: all is told
    engine: str = "without it"  # or in it (_IN_ENGINE), over
    to_engine: tuple[str, ...] = ()
    to_loop: tuple[LiveEvent | str, ...] = ()
    num_news: int = 0
    is_timed: bool = True
    num_ends: int = 0
    is_late: bool = False  # a redirection came on its way into the engine
    blocks: str = "none"  # of a request that was let go: out, kept, freed
    wishes_left: int = 3  # of the router: aborts, moves, redirections; of the process: its end
    breaks_left: int = 1
    breaks: bool = False

    # ---- what may happen ----

    def steps(self) -> Iterator[Step]:
        if self.admission == "comes":
            yield Step("enter", must=False)
            yield Step("join", must=False)
            yield Step("join_and_end", must=False)
            yield Step("fail", must=False)
        elif self.admission in ("done", "failed", "cancelled"):
            yield Step("hear_of_admission")
        if self.to_engine:
            yield Step("command")
            if self.to_engine[0] == "join":
                yield Step("end_at_joining", must=False)
                yield Step("refuse_to_join", must=False)
            if self.to_engine[0] == "enter":
                yield Step("refuse_to_enter", must=False)
        else:
            yield from self._of_engine()
        if self.to_loop:
            yield Step("report")
            if self.to_loop[0] in (_E.TOKENS, _E.LAST) and self.breaks_left:
                yield Step("report_and_break", must=False)
        if self.state is not LiveState.ENDED:  # the session still has it
            if self.is_timed:
                yield Step("expire")
            if self.wishes_left:
                for event in (_E.ABORTED, _E.CLOSED, _E.MOVE_ASKED, _E.REDIRECT_ASKED):
                    yield Step("wish", (event,), must=False)

    def _of_engine(self) -> Iterator[Step]:
        if self.engine == "waiting":
            yield Step("schedule", must=False)
        elif self.engine in ("prefilling", "decoding"):
            yield Step("last_step", must=False)
            if self.num_news < _MAX_NEWS:
                yield Step("step", must=False)

    def enter(self) -> None:
        self.admission = "enters"
        self.to_engine += ("enter",)

    def join(self) -> None:
        """Blocks came, and with them a first token: the engine is asked to go on from there."""
        self.admission = "joins"
        self.to_engine += ("join",)
        self._tell(_E.TOKENS)

    def join_and_end(self) -> None:
        """The first token was the last."""
        self.admission = "done"
        self._tell(_E.LAST)

    def fail(self) -> None:
        self.admission = "failed"

    def hear_of_admission(self) -> None:
        how, self.admission = self.admission, "over"
        self._tell(_E.ADMITTED if how == "done" else _E.NOT_ADMITTED)
        if how == "done" and self.is_late:
            self._tell(_E.REDIRECT_ASKED)

    def command(self) -> None:
        command, self.to_engine = self.to_engine[0], self.to_engine[1:]
        match command:
            case "enter":
                self.engine = "waiting"
                self.to_loop += ("entered",)
            case "join":
                self.engine = "decoding"
                self.to_loop += ("entered",)
            case "drop" if self.engine in _IN_ENGINE:
                self.engine = "over"
            case "retract" if self.engine in ("waiting", "prefilling"):
                self.engine = "without it"
                self.to_loop += (_E.GIVEN_UP,)
            case "suspend" if self.engine in ("waiting", "decoding"):
                self.engine, self.blocks = "over", "out"
                self.to_loop += (_E.LET_GO,)

    def refuse_to_enter(self) -> None:
        self.to_engine = self.to_engine[1:]
        self.to_loop += ("refused",)

    def refuse_to_join(self) -> None:
        """The engine does not take the blocks: then the prompt is computed here."""
        self.to_engine = self.to_engine[1:]
        self.to_loop += ("to be computed",)

    def end_at_joining(self) -> None:
        self.to_engine = self.to_engine[1:]
        self.engine = "over"
        self.to_loop += ("entered, and ended",)

    def schedule(self) -> None:
        self.engine = "prefilling"

    def step(self) -> None:
        self.engine = "decoding"
        self.num_news += 1
        self.to_loop += (_E.TOKENS,)

    def last_step(self) -> None:
        self.engine = "over"
        self.to_loop += (_E.LAST,)

    def report(self) -> None:
        event, self.to_loop = self.to_loop[0], self.to_loop[1:]
        if isinstance(event, LiveEvent):
            self._tell(event)
        elif self.admission in ("enters", "joins"):  # else it was cancelled meanwhile
            self._go_on(event)

    def _go_on(self, outcome: str) -> None:
        """The admission has heard from the engine; it ends a moment later."""
        if outcome == "to be computed":
            self.enter()
            return
        self.admission = "failed" if outcome == "refused" else "done"
        if outcome == "entered, and ended":
            self._tell(_E.LAST)

    def wish(self, event: LiveEvent) -> None:
        self.wishes_left -= 1
        self._tell(event)

    def expire(self) -> None:
        is_awaited = self.admission != "over" or self.engine in _IN_ENGINE or self.to_engine or self.to_loop
        assert is_awaited, "but for its deadline it would wait for ever: nobody has it"
        self._tell(_E.EXPIRED)

    # ---- what the service does ----

    def _do(self, action: LiveAction) -> None:
        match action:
            case LiveAction.CANCEL:
                if self.admission in ("comes", "enters", "joins"):
                    self.admission = "cancelled"
            case LiveAction.DROP:
                self.to_engine += ("drop",)
            case LiveAction.SUSPEND:
                self.to_engine += ("suspend",)
            case LiveAction.AIM:
                self.is_late = self.admission != "comes"  # else it begins anew, from the same state
            case LiveAction.RETRACT:
                self.to_engine += ("retract",)
            case LiveAction.ADMIT:
                assert self.admission == "over", "two admissions at a time"
                self.admission, self.is_late = "comes", False
            case LiveAction.SAY:
                assert not self.num_ends, "tokens come after the last output"
                self._break()
            case LiveAction.KEEP | LiveAction.FREE:
                assert self.blocks == "out", f"blocks that are {self.blocks} come to an end again"
                self.blocks = "kept" if action is LiveAction.KEEP else "freed"
            case LiveAction.END:
                self.num_ends += 1
                self.is_timed = False
                assert self.num_ends == 1, "two last outputs"
                self._break()  # it is on the way: what breaks is the counting

    def why_not_at_rest(self) -> str:
        left = {
            f"its state: {self.state.name}": self.state is not LiveState.ENDED,
            "its last output": self.num_ends != 1,
            "its admission": self.admission not in ("over",),
            "a place in the engine": self.engine in _IN_ENGINE,
            "blocks that it left": self.blocks == "out",
        }
        return ", ".join(what for what, is_left in left.items() if is_left)
