"""Hashes a prompt's blocks and asks the index who holds them, once per prompt.

The index is a hint. Where it is slow, down or not there, the answer is "nobody", and routing goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.block import BlockHash, hash_blocks, namespace
from kvstore.index import Holding, IndexReader
from services.router.metrics import RouterMetrics

log = logging.getLogger(__name__)

MAX_LOOKUPS = 32
"""Prompts of one HTTP request that the index is asked for; the others go by what this router remembers."""


class BlockSpace(NamedTuple):
    """Decides, with tokens and salt, how a prompt is cut into hashed blocks."""

    model_fingerprint: str
    block_size: int
    adapter: str = ""
    """Its key."""

    def root(self, cache_salt: str) -> BlockHash:
        """What the hashes of a prompt begin with."""
        return namespace(self.model_fingerprint, cache_salt, self.adapter)


@dataclass(frozen=True)
class PromptBlocks:
    """One prompt's full blocks in each space that serves its model, and the index's answer to them."""

    hashes: Mapping[BlockSpace, Sequence[BlockHash]] = field(default_factory=dict)
    holdings: Mapping[BlockSpace, Sequence[Holding]] = field(default_factory=dict)
    index_s: float | None = None
    """How long the index took; None: it was not asked."""


class PrefixFinder:
    """Hashes prompts and asks the index. One per router."""

    def __init__(
        self, index: IndexReader | None, metrics: RouterMetrics, timeout_s: float, clock: Callable[[], float]
    ) -> None:
        self._index = index
        self._clock = clock
        self._metrics = metrics
        self._timeout_s = timeout_s
        if index is not None:
            metrics.index_up.set_function(lambda: index.available)

    async def find(
        self, prompts: Sequence[Sequence[int]], cache_salt: str, spaces: Iterable[BlockSpace]
    ) -> list[PromptBlocks]:
        """One answer per prompt."""
        wanted = [
            space for space in dict.fromkeys(spaces) if any(len(prompt) >= space.block_size for prompt in prompts)
        ]
        if not wanted:
            return [PromptBlocks()] * len(prompts)
        if len(prompts) == 1:
            return [await self._ask(_hash(prompts[0], cache_salt, wanted))]
        hashed = []
        for prompt in prompts:
            # Here and not in a thread: 0.05 us a token, most of it with the interpreter's lock, is less than the way.
            hashed.append(_hash(prompt, cache_salt, wanted))
            await asyncio.sleep(0)
        answers = await asyncio.gather(*(self._ask(hashes) for hashes in hashed[:MAX_LOOKUPS]))
        return [*answers, *(PromptBlocks(hashes) for hashes in hashed[MAX_LOOKUPS:])]

    async def _ask(self, hashes: dict[BlockSpace, list[BlockHash]]) -> PromptBlocks:
        index = self._index
        asked = [space for space in hashes if hashes[space]]
        if index is None or not asked:
            return PromptBlocks(hashes)
        start = self._clock()
        answers: Sequence[Sequence[Holding]] = ()
        was_available = index.available
        try:
            # The index keeps its own deadline; ours is for the day when it does not.
            async with asyncio.timeout(2 * self._timeout_s):
                answers = await asyncio.gather(*(index.lookup(hashes[space], self._timeout_s) for space in asked))
            has_answered = was_available and index.available
        except TimeoutError:
            has_answered = False
        except Exception:
            log.exception("the index's answer cannot be read")
            has_answered = False
        index_s = self._clock() - start
        self._metrics.count_lookup("found" if any(answers) else "nothing" if has_answered else "no_answer", index_s)
        return PromptBlocks(hashes, dict(zip(asked, answers, strict=False)), index_s)


def _hash(prompt: Sequence[int], cache_salt: str, spaces: Sequence[BlockSpace]) -> dict[BlockSpace, list[BlockHash]]:
    return {space: hash_blocks(space.root(cache_salt), prompt, space.block_size) for space in spaces}
