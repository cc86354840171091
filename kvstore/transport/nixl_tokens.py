"""Holds the token that peers read of us to prove that a path works, and the places for what we read of theirs."""

from __future__ import annotations

import itertools
import secrets
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.errors import TransportError

TOKEN_BYTES: Final = 16
_NUM_PLACES: Final = 64


class Tokens:
    """In main memory, registered as long as the agent lives."""

    def __init__(self) -> None:
        # Row 0 is ours, for peers to read. The others are for what we read, each check into one of its own: handshakes
        # overlap, and a check that was given up may still receive its bytes.
        self._rows = np.zeros((1 + _NUM_PLACES, TOKEN_BYTES), np.uint8)
        self._rows[0] = np.frombuffer(secrets.token_bytes(TOKEN_BYTES), np.uint8)
        self._places = itertools.cycle(range(1, 1 + _NUM_PLACES))

    @property
    def address(self) -> int:
        """Of all of them, and of ours."""
        return int(self._rows.ctypes.data)

    @property
    def size_bytes(self) -> int:
        """Of all of them."""
        return self._rows.nbytes

    @property
    def ours(self) -> bytes:
        """What peers read."""
        return bytes(self._rows[0])

    def place_for(self, token: bytes) -> npt.NDArray[np.uint8]:
        """Return zeros for what is read of a peer. Raises `TransportError` where what it says can be no token."""
        if len(token) != TOKEN_BYTES:
            raise TransportError(f"a token of {len(token)} bytes")
        place: npt.NDArray[np.uint8] = self._rows[next(self._places)]
        place[:] = 0
        return place
