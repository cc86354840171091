"""What the parent of a router's processes and one of them say to each other. Pure.

    parent                              process
      │ Start ─────────────────────────▶│ number, settings
      │◀──────────────────────── Serving│ it takes connections
      │◀─────────────────────────── Beat│ each second: its event loop gets on
      │◀──────────────────────────── Ask│ a question to all processes, itself among them
      │ Ask ───────────────────────────▶│ such a question, passed on
      │◀───────────────────────── Answer│
      │ Answers ───────────────────────▶│ to who has asked: of those that have answered in time

Both ends are always of one version: the parent has started the process.
"""

from __future__ import annotations

from typing import Final

import msgspec

from services.router.config import RouterConfig

METRICS: Final = "metrics"
"""The one question whose answers the parent adds up itself: it remembers what ended processes have counted."""


class Start(msgspec.Struct, tag=True):
    """The first message to a process. `number`: from 1 on, the same for who takes its place."""

    number: int
    num_processes: int
    is_replacement: bool
    """Others serve already: it takes connections once it has something to serve."""
    config: RouterConfig
    """Its part of what was given to the router."""


class Serving(msgspec.Struct, tag=True):
    """It takes connections from now on."""


class Beat(msgspec.Struct, tag=True):
    """It lives."""


class Ask(msgspec.Struct, tag=True):
    """A question: the name of a view, and its arguments as a list."""

    id: int
    view: str
    arguments: msgspec.Raw
    to: int = 0
    """One process's number; 0: all of them."""


class Answer(msgspec.Struct, tag=True):
    """What one process answers: one value, or none."""

    id: int
    values: list[msgspec.Raw]


class Answers(msgspec.Struct, tag=True):
    """What those have answered that did, in order of their numbers."""

    id: int
    values: list[msgspec.Raw]


ToChild = Start | Ask | Answers
ToParent = Serving | Beat | Ask | Answer
