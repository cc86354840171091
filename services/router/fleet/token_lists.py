"""Has a worker told a request's lists of tokens once in a session, not with each of its sequences' orders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tandem.v1 import worker_pb2 as pb


@dataclass
class _Told:
    sampling: pb.SamplingParams
    number: int
    handles: set[int] = field(default_factory=set)


class ToldLists:
    """The lists that the worker of a session holds for us: each while an order that runs there goes by it.

        unknown ─ use: lists are sent ─▶ told ─ its last order here has ended: forget is sent ─▶ unknown

    An order's end may be on its way to us when the next order goes by its lists: so we say when they are forgotten,
    not the worker. Lists are the same if they are the same object.
    """

    def __init__(self, send: Callable[[pb.SessionRequest], None]) -> None:
        self._send = send
        self._told: dict[int, _Told] = {}  # by the object's id, which is nobody else's while we hold it
        self._by_handle: dict[int, _Told] = {}
        self._last_number = 0

    def use(self, handle: int, sampling: pb.SamplingParams) -> int:
        """An order of that handle goes by these lists; returns the number that it names them by."""
        told = self._told.get(id(sampling))
        if told is None:
            self._last_number = self._last_number % 0xFFFFFFFF + 1
            told = self._told[id(sampling)] = _Told(sampling, self._last_number)
            self._send(pb.SessionRequest(lists=pb.TokenLists(number=told.number, sampling=sampling)))
        told.handles.add(handle)
        self._by_handle[handle] = told
        return told.number

    def ended(self, handle: int) -> None:
        """The order of that handle, if it went by lists, does so no more."""
        told = self._by_handle.pop(handle, None)
        if told is None:
            return
        told.handles.discard(handle)
        if not told.handles:
            del self._told[id(told.sampling)]
            self._send(pb.SessionRequest(forget=pb.ForgetLists(number=told.number)))

    def clear(self) -> None:
        """The session is lost, and the worker has forgotten all."""
        self._told.clear()
        self._by_handle.clear()
