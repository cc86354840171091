"""Visits every state that a small model can reach, breadth first, and checks each.

A model is a dataclass of plain values; its methods are the steps. What `must` happen sooner or later (messages arrive,
tasks end, deadlines pass) is told from what may never. What must happen goes in no circle, and where nothing must
happen any more the model is at rest: so from every state the end is reached.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar


class Step(NamedTuple):
    """A method of the model, and whether it happens sooner or later if nothing else does."""

    method: str
    arguments: tuple[Any, ...] = ()
    must: bool = True


class Model(Protocol):
    """Something that takes steps. A step that breaks an invariant raises."""

    def steps(self) -> Iterable[Step]: ...

    def why_not_at_rest(self) -> str:
        """What is left, where nothing must happen any more; empty: nothing."""


M = TypeVar("M", bound=Model)


@dataclass
class Findings:
    """What was seen."""

    num_states: int = 0
    num_steps: int = 0
    num_rests: int = 0
    violation: str = ""
    story: list[str] = field(default_factory=list)


def explore(start: Model) -> Findings:
    """Visit all states, until the first violation; its story is one of the shortest."""
    found = Findings()
    numbers: dict[tuple[Any, ...], int] = {_key(start): 0}
    came_by: list[tuple[int, str]] = [(-1, "")]
    leads_to: list[list[int]] = []
    waiting = deque([start])
    while waiting:
        model, number = waiting.popleft(), found.num_states
        found.num_states += 1
        leads_to.append([])
        steps = list(model.steps())
        if not any(step.must for step in steps):
            found.num_rests += 1
            if why := model.why_not_at_rest():
                return _told(found, came_by, number, "", f"nothing must happen any more, and this is left: {why}")
        for step in steps:
            after = dataclasses.replace(model)  # type: ignore[type-var]
            words = f"{step.method}({', '.join(map(str, step.arguments))})"
            try:
                getattr(after, step.method)(*step.arguments)
            except Exception as error:
                return _told(found, came_by, number, words, f"{type(error).__name__}: {error}")
            found.num_steps += 1
            key = _key(after)
            if key not in numbers:
                numbers[key] = len(numbers)
                came_by.append((number, words))
                waiting.append(after)
            if step.must:
                leads_to[number].append(numbers[key])
    circle = _circle(leads_to)
    if circle is not None:
        return _told(found, came_by, circle, "", "what must happen goes in a circle")
    return found


def _key(model: Any) -> tuple[Any, ...]:
    return tuple(vars(model).values())


def _told(found: Findings, came_by: list[tuple[int, str]], number: int, last: str, what: str) -> Findings:
    story = [last] if last else []
    while number > 0:
        number, words = came_by[number]
        story.append(words)
    found.violation, found.story = what, story[::-1]
    return found


def _circle(leads_to: list[list[int]]) -> int | None:
    """Return a state on, or before, a circle; None: there is none."""
    num_into = [0] * len(leads_to)
    for targets in leads_to:
        for target in targets:
            num_into[target] += 1
    ready = [number for number, count in enumerate(num_into) if not count]
    while ready:
        for target in leads_to[ready.pop()]:
            num_into[target] -= 1
            if not num_into[target]:
                ready.append(target)
    return next((number for number, count in enumerate(num_into) if count), None)
