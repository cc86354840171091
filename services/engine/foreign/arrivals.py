"""Blocks that transfers fill: used once what came is proven, and wiped before they are free where it is not.

Attention computes with whole blocks: what lies behind a sequence's end counts nothing, as zero times what is there. A
number would be nothing then, but NaN stays NaN, and the token with it. So what nobody has proven may not stay in a
block that others get next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Arrivals:
    """The blocks of one engine, by their ids; `caches` are its ranks' views, as `byte_view` makes them.

    Of `num_holders` neighbours, which have the same heads, transfers write to the first alone.
    """

    def __init__(self, caches: Sequence[Tensor], num_holders: int) -> None:
        self._shares = caches[::num_holders]
        self._copies = [(caches[i - i % num_holders], cache) for i, cache in enumerate(caches) if i % num_holders]
        self._awaited: set[int] = set()

    def expect(self, block_ids: Iterable[int]) -> None:
        """Note that these are filled from elsewhere."""
        self._awaited.update(block_ids)

    def accept(self, block_ids: Sequence[int]) -> None:
        """All of them hold what their proofs prove: every rank gets it."""
        for source, target in self._copies:
            target[:, block_ids] = source[:, block_ids].to(target.device)
            _finish(target)
        self._awaited.difference_update(block_ids)

    def give_up(self, block_ids: Iterable[int]) -> None:
        """They are about to be free, and no byte comes any more: wipe those that were never accepted."""
        unproven = self._awaited.intersection(block_ids)
        self._awaited -= unproven
        self.wipe(unproven)

    def wipe(self, block_ids: Iterable[int]) -> None:
        """Fill them with zeros."""
        chosen = list(block_ids)
        for share in self._shares if chosen else ():
            share[:, chosen] = 0
            _finish(share)


def _finish(cache: Tensor) -> None:
    """Wait until it is so: the ranks are processes of their own."""
    if cache.is_cuda:
        torch.cuda.synchronize(cache.device)
