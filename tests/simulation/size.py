"""How large a world of exchanges is.

Most faults show in small worlds, too: of 198 failures of distributed systems in production 98 % needed three nodes at
most, and most of them three events or fewer (Yuan et al., Simple Testing Can Prevent Most Critical Failures, OSDI 2014;
Jackson, Software Abstractions, 2006, calls it the small scope hypothesis). A seed of `PAIR` costs a ninth of one of
`EXCHANGE`, so many more are run; what needs a third worker, a long prefix or many users at once is for that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Size:
    """One world: its workers, what they have, what befalls them."""

    names: tuple[str, ...]
    num_blocks: int
    """Of each worker's pool."""
    num_clients: int
    """Of each worker."""
    num_chains: int
    chain_blocks: int
    """Of the longest prefix."""
    pause_s: float
    """Between two faults, at most."""
    are_busy_on: bool
    """Whether users go on after the faults, while everybody must serve."""
    share: float
    """Of all kinds of fault, how many a seed has in the mean."""


EXCHANGE: Final = Size(
    ("a", "b", "c"),
    num_blocks=24,
    num_clients=2,
    num_chains=6,
    chain_blocks=6,
    pause_s=2.0,
    are_busy_on=True,
    share=0.4,
)
PAIR: Final = Size(
    ("a", "b"), num_blocks=8, num_clients=1, num_chains=2, chain_blocks=3, pause_s=1.0, are_busy_on=False, share=0.25
)
SIZES: Final = {"exchange": EXCHANGE, "pair": PAIR}
