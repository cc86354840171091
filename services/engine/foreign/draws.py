"""Draws by seed and place, where another engine's generators go on from draw to draw.

So the same token follows however a prompt was cut into steps, and wherever the output before it was made.
"""

from __future__ import annotations

import hashlib

import torch


class PlacedGenerator(torch.Generator):
    """A generator that is seeded anew for each draw, so that there is nothing to go back to."""

    def get_offset(self) -> int:
        return 4  # engines take a draw back by this much, which generators of CPUs refuse

    def set_offset(self, offset: int) -> torch.Generator:
        return self  # nothing goes on from here

    def place(self, seed: int, position: int) -> PlacedGenerator:
        """Seed it for the token at `position`."""
        said = seed.to_bytes(8, "little", signed=True) + position.to_bytes(8, "little")
        self.manual_seed(int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "little") >> 1)
        return self
