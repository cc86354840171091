"""Groups blocks that travel as one message: neighbours in the owner's pool and in ours. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """Neighbouring blocks that move as one: `remote_first ...` of the owner's into `local_first ...` of ours."""

    remote_first: int
    local_first: int
    num_blocks: int


def coalesce(remote_ids: Sequence[int], local_ids: Sequence[int], max_blocks: int) -> list[Run]:
    """Cut the pairs of block ids into runs of at most `max_blocks` in which both ids count up by one. Keeps the order.

    remote 7 8 9 3 4
    local  0 1 2 3 9   gives (7, 0, 3) (3, 3, 1) (4, 9, 1)
    """
    if max_blocks < 1:
        raise ValueError(f"runs of at most {max_blocks} blocks")
    runs: list[Run] = []
    for remote_id, local_id in zip(remote_ids, local_ids, strict=True):
        if runs:
            last = runs[-1]
            joins = remote_id == last.remote_first + last.num_blocks and local_id == last.local_first + last.num_blocks
            if joins and last.num_blocks < max_blocks:
                runs[-1] = Run(last.remote_first, last.local_first, last.num_blocks + 1)
                continue
        runs.append(Run(remote_id, local_id, 1))
    return runs
