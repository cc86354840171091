"""A request as an adapter knows it, beside what the engine knows of it, and the order in which requests get memory."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from kvstore.block import HASH_BYTES, BlockHash, extend_hashes, namespace
from kvstore.protocol import Reservation
from services.engine.request import FinishReason, Request, RequestUpdate, SampledToken

_NOBODYS: Final = b"\0" * (HASH_BYTES // 2)


def nobodys_hash() -> BlockHash:
    """A key for an engine's cache that nobody else will ever ask for, and that no hash of ours looks like."""
    return BlockHash(_NOBODYS + os.urandom(HASH_BYTES - len(_NOBODYS)))


def is_nobodys(block_hash: BlockHash) -> bool:
    """Whether `nobodys_hash` made it."""
    return block_hash.startswith(_NOBODYS)


class Place(Enum):
    """Where a request is; adapters have the table."""

    BEHIND = "behind"
    QUEUED = "queued"
    RESERVING = "reserving"
    RESERVED = "reserved"


@dataclass(eq=False)
class Live:
    """One request from its order to its end."""

    asked: Request
    number: int  # of all that came to this engine: makes its id there, which may not repeat while the engine forgets
    place: Place
    root: BlockHash
    block_size: int
    hashes: list[BlockHash]  # of its tokens' full blocks
    is_shared: bool  # whether its blocks are findable by these
    is_truthful: bool  # False: it came with hashes of other tokens, so that nobody may be told of its blocks
    core: Any = None  # QUEUED: the engine's own request
    was_scheduled: bool = False
    has_joined: bool = False  # its context came from elsewhere
    num_cached_tokens: int = 0
    num_lent_blocks: int = 0  # with hold_blocks
    num_preemptions: int = 0

    @classmethod
    def of(cls, asked: Request, number: int, place: Place, fingerprint: str, block_size: int, *, shares: bool) -> Live:
        """Hash its context, and hold what it came with against that."""
        root, hashes = namespace(fingerprint, asked.cache_salt, asked.adapter), list[BlockHash]()
        extend_hashes(root, hashes, [*asked.prompt_token_ids, *asked.resumed_token_ids], block_size)
        is_truthful = list(asked.given_hashes) == hashes[: len(asked.given_hashes)]
        return cls(asked, number, place, root, block_size, hashes, shares and is_truthful, is_truthful)

    @property
    def core_id(self) -> str:
        return f"{self.asked.request_id}#{self.number}"

    @property
    def order(self) -> tuple[int, float, int]:
        """Who is served first."""
        return self.asked.priority, self.asked.arrival_s, self.number

    @property
    def num_context_blocks(self) -> int:
        """That its context fills or begins."""
        return -(-self.asked.num_context_tokens // self.block_size)

    @property
    def findable_hashes(self) -> list[BlockHash]:
        """By which others' blocks are of use to it."""
        return self.hashes if self.is_shared else []

    def joined(
        self, told: Sequence[SampledToken], reason: FinishReason | None, stop_token_id: int | None
    ) -> RequestUpdate:
        """The update of one whose context came from elsewhere, perhaps with its first token."""
        return RequestUpdate(
            request=self.asked,
            num_computed_tokens=self.asked.num_context_tokens,
            new_tokens=tuple(told),
            finish_reason=reason,
            stop_token_id=stop_token_id,
            num_output_tokens=len(self.asked.resumed_token_ids) + len(told),
        )

    def new_keys(self, first: int, token_ids: Sequence[int]) -> list[BlockHash]:
        """The keys in the engine's cache of the blocks from `first` on that these tokens, all so far, have filled."""
        end = len(token_ids) // self.block_size
        if end <= first:
            return []
        extend_hashes(self.root, self.hashes, token_ids, self.block_size)
        return self.hashes[first:end] if self.is_shared else [nobodys_hash() for _ in range(first, end)]

    def told_hashes(self, first: int, num_blocks: int, num_full: int) -> list[BlockHash | None]:
        """Whom readers may take blocks for, of which `num_full` in all are full; None: for nobody but themselves."""
        known: list[BlockHash | None] = list(self.hashes[:num_full]) if self.is_truthful else [None] * num_full
        return [*known, None][first : first + num_blocks]


class Turns:
    """Requests that wait for memory beside the engine: reservations, and those that came after one of them.

    Reservations and the engine's queue are one order, by priority and arrival: what comes after a reservation that
    waits for blocks stays behind it.
    """

    def __init__(self) -> None:
        self._reserving: list[Live] = []
        self._behind: list[Live] = []
        self._on_grant: dict[str, Callable[[Reservation], None]] = {}

    def __len__(self) -> int:
        return len(self._reserving) + len(self._behind)

    @property
    def num_waiting_tokens(self) -> int:
        """Context tokens of those that are to be computed here. Any thread."""
        return sum(live.asked.num_context_tokens for live in list(self._behind))

    @property
    def next_reservation(self) -> Live | None:
        return self._reserving[0] if self._reserving else None

    def add(self, live: Live) -> None:
        """Place.BEHIND: it enters the engine when `take_free` gives it."""
        bisect.insort(self._behind, live, key=lambda each: each.order)

    def reserve(self, live: Live, callback: Callable[[Reservation], None]) -> None:
        """Place.RESERVING."""
        bisect.insort(self._reserving, live, key=lambda each: each.order)
        self._on_grant[live.asked.request_id] = callback

    def grant(self) -> Callable[[Reservation], None]:
        """Take the next reservation out; what to call with its blocks."""
        return self._on_grant.pop(self._reserving.pop(0).asked.request_id)

    def take_free(self) -> Iterator[Live]:
        """Take out those that no reservation stands before."""
        while self._behind and not (self._reserving and self._reserving[0].order < self._behind[0].order):
            yield self._behind.pop(0)

    def leave(self, live: Live) -> None:
        """Take one out, if it waits here."""
        if live.place is Place.RESERVING:
            self._reserving.remove(live)
            del self._on_grant[live.asked.request_id]
        elif live.place is Place.BEHIND:
            self._behind.remove(live)
