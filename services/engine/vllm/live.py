"""A request as the adapter knows it, beside what vLLM knows of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vllm.v1.request import Request as VllmRequest

from kvstore.block import BlockHash, extend_hashes, namespace
from services.engine.request import Request
from services.engine.vllm.blocks import nobodys_hash


class Place(Enum):
    """Where a request is; the room's docstring has the table."""

    BEHIND = "behind"
    QUEUED = "queued"
    RESERVING = "reserving"
    RESERVED = "reserved"


@dataclass(eq=False)
class Live:
    """One request from its order to its end."""

    asked: Request
    number: int  # of all that came to this engine: makes vLLM's id, which may not repeat while its runner forgets
    place: Place
    root: BlockHash
    block_size: int
    hashes: list[BlockHash]  # of its tokens' full blocks
    is_shared: bool  # whether its blocks are findable by these
    is_truthful: bool  # False: it came with hashes of other tokens, so that nobody may be told of its blocks
    core: VllmRequest | None = None  # QUEUED
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

    def new_keys(self, request: VllmRequest) -> list[BlockHash]:
        """The keys in vLLM's cache of the blocks that have become full (its `block_hasher`)."""
        first, end = len(request.block_hashes), len(request.all_token_ids) // self.block_size
        if end <= first:
            return []
        extend_hashes(self.root, self.hashes, request.all_token_ids, self.block_size)
        return self.hashes[first:end] if self.is_shared else [nobodys_hash() for _ in range(first, end)]

    def told_hashes(self, first: int, num_blocks: int, num_full: int) -> list[BlockHash | None]:
        """Whom readers may take blocks for, of which `num_full` in all are full; None: for nobody but themselves."""
        known: list[BlockHash | None] = list(self.hashes[:num_full]) if self.is_truthful else [None] * num_full
        return [*known, None][first : first + num_blocks]
