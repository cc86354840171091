"""Proves two processes to each other by a key that both have, and what they send from then on. Pure.

All values are HMAC-SHA256 over the very bytes in which both have introduced themselves, with a fresh nonce of each, and
under a label for each side and use. So what proves one side of one connection proves nothing else: it is wrong when it
is replayed, reflected, or mixed with another connection's.

This shows who speaks, and that nobody else does so on the same connection. It does not encrypt.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

SEAL_BYTES: Final = 16
_NO_KEY: Final = b""
"""What a process without a secret has in common with all others without one."""
_ID_BYTES: Final = 8

Side = Literal["dialler", "listener"]


@dataclass(frozen=True)
class PeerKeys:
    """The keys by which a process knows its peers: the one that it uses, and those that it takes from others, too."""

    _keys: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def ids(self) -> list[bytes]:
        """Names that tell nothing of the keys; what both say of theirs."""
        return [_id_of(key) for key in self._all]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def shared(self, listener_ids: Sequence[bytes], dialler_ids: Sequence[bytes]) -> bytes | None:
        """The key that both ends choose: the first of the listener's that the dialler has, too."""
        common = next((each for each in listener_ids if each in dialler_ids), None)
        return next((key for key in self._all if _id_of(key) == common), None)

    def why_none(self, peer_id: str, their_ids: Sequence[bytes]) -> str:
        """Say, to whoever mends it, how it comes that we have no key in common with a peer."""
        if not self._keys:
            return f"{peer_id} has a peer secret, and we have none"
        return f"{peer_id} has {'no peer secret' if _id_of(_NO_KEY) in their_ids else 'another peer secret'}"

    @property
    def _all(self) -> tuple[bytes, ...]:
        return self._keys or (_NO_KEY,)


def _id_of(key: bytes) -> bytes:
    return hmac.digest(key, b"tandem peer key", hashlib.sha256)[:_ID_BYTES]


@dataclass(frozen=True)
class Transcript:
    """What both ends of a connection know once both have introduced themselves, byte by byte."""

    _key: bytes = field(repr=False)
    _dialler: bytes
    _listener: bytes

    def proof(self, side: Side, *more: bytes) -> bytes:
        """What a side proves itself by, and says besides; 32 bytes."""
        return self.key(f"{side} proves", *more)

    def holds(self, proof: bytes, side: Side, *more: bytes) -> bool:
        """Whether this is that side's proof. Takes the same time for all that are not."""
        return hmac.compare_digest(proof, self.proof(side, *more))

    def seal(self, side: Side) -> Seal:
        """The seal of the frames that a side sends."""
        return Seal(self.key(f"{side} seals"))

    def key(self, purpose: str, *more: bytes) -> bytes:
        """A key of this connection's own."""
        parts = [purpose.encode(), self._dialler, self._listener, *more]
        message = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        return hmac.digest(self._key, message, hashlib.sha256)


class Seal:
    """Seals one direction's frames, in their order."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._num_sealed = 0

    def of(self, body: bytes) -> bytes:
        """The seal of the next frame, `SEAL_BYTES`."""
        self._num_sealed += 1
        message = self._num_sealed.to_bytes(8, "big") + body
        return hmac.digest(self._key, message, hashlib.sha256)[:SEAL_BYTES]
