"""Proves the calls of one process to another. Pure: `grpc_peers.py` carries it.

caller                                             worker
  | Introduce(nonce, key ids, address dialled) ----> |  a session, yet unproven
  | <------------ (nonce, key ids, the worker's proof)|  wrong, or for another address: the caller sends nothing
  | any call, with session, number, proof ---------> |  the first right one proves the session; each number goes once

| what goes wrong | what happens |
|---|---|
| no key in common, or a wrong proof of the worker's | the caller gives up, with the reason |
| a call without proof, with a wrong one, a number that was there, a session that is not | UNAUTHENTICATED |
| the worker was restarted, or has forgotten the session for newer ones | the same; the caller introduces itself anew |
| introductions without end | the oldest unproven sessions are forgotten; proven ones stay |
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from tandem.v1 import worker_pb2 as pb

from kvstore.peer_keys import PeerKeys, Transcript

NONCE_BYTES: Final = 16
_MAX_UNPROVEN: Final = 256
_MAX_PROVEN: Final = 1024
_WINDOW: Final = 4096
"""Calls that may overtake one that has not come."""


class NotProven(Exception):
    """The other side has not shown that it has our key; the message says why."""


def _transcript(key: bytes, introduction: pb.Introduction, nonce: bytes) -> Transcript:
    # Both nonces have the same length, so that this cannot be read in two ways.
    return Transcript(key, introduction.nonce + introduction.address.encode(), nonce)


class CallerSession:
    """The caller's end of a session with one worker."""

    def __init__(self, keys: PeerKeys, address: str, nonce: bytes) -> None:
        self._keys = keys
        self.introduction = pb.Introduction(nonce=nonce, key_ids=keys.ids, address=address)
        self._key = b""
        self._nonce = b""
        self._num_calls = 0

    def accept(self, reply: pb.IntroductionReply) -> None:
        """Take the worker's word that it is one. Raises NotProven."""
        address = self.introduction.address
        key = self._keys.shared(reply.key_ids, self._keys.ids)
        if key is None:
            raise NotProven(self._keys.why_none(address, reply.key_ids))
        transcript = _transcript(key, self.introduction, reply.nonce)
        if not transcript.holds(reply.proof, "listener"):
            raise NotProven(f"{address} has not proven itself")
        self._key, self._nonce = transcript.key("calls"), reply.nonce

    def next_call(self, method: str) -> str:
        """The proof of the next call, once."""
        self._num_calls += 1
        return f"{self._nonce.hex()} {self._num_calls} {_proof_of(self._key, self._num_calls, method).hex()}"


class WorkerSessions:
    """The worker's end of all its callers' sessions."""

    address = ""
    """Under which callers know us."""

    def __init__(self, keys: PeerKeys, new_nonce: Callable[[], bytes]) -> None:
        self._keys = keys
        self._new_nonce = new_nonce
        self._unproven: OrderedDict[bytes, bytes] = OrderedDict()
        self._proven: OrderedDict[bytes, _Calls] = OrderedDict()

    def introduce(self, introduction: pb.Introduction) -> pb.IntroductionReply:
        """Answer a caller, who may be anybody. Raises NotProven for one who means another worker."""
        reply = pb.IntroductionReply(nonce=self._new_nonce(), key_ids=self._keys.ids)
        key = self._keys.shared(self._keys.ids, introduction.key_ids)
        if not self._keys or key is None or len(introduction.nonce) != NONCE_BYTES:
            return reply  # which says why it gets no proof
        if introduction.address != self.address:
            raise NotProven(f"{introduction.address} was dialled, and this is {self.address}")
        transcript = _transcript(key, introduction, reply.nonce)
        reply.proof = transcript.proof("listener")
        self._unproven[reply.nonce] = transcript.key("calls")
        if len(self._unproven) > _MAX_UNPROVEN:
            self._unproven.popitem(last=False)
        return reply

    def is_proven(self, method: str, proof: str) -> bool:
        """Whether a call is a peer's. Its number is used up then."""
        try:
            nonce_hex, number_text, mac_hex = proof.split(" ")
            nonce, number, mac = bytes.fromhex(nonce_hex), int(number_text), bytes.fromhex(mac_hex)
        except ValueError:
            return False
        if not 0 < number < 1 << 63:
            return False
        known = self._proven.get(nonce)
        key = known.key if known is not None else self._unproven.get(nonce)
        if key is None or not hmac.compare_digest(mac, _proof_of(key, number, method)):
            return False
        if known is None:
            del self._unproven[nonce]
            known = self._proven[nonce] = _Calls(key)
            if len(self._proven) > _MAX_PROVEN:
                self._proven.popitem(last=False)
        self._proven.move_to_end(nonce)
        return known.take(number)


class _Calls:
    """The numbers that a session's calls have had: all up to `_floor`, and those in `_above`."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self._floor = 0
        self._above: set[int] = set()

    def take(self, number: int) -> bool:
        """Whether it is new."""
        if number <= self._floor or number in self._above:
            return False
        self._above.add(number)
        if len(self._above) > _WINDOW:  # one has never come
            self._floor = min(self._above) - 1
        while self._floor + 1 in self._above:
            self._floor += 1
            self._above.remove(self._floor)
        return True


def _proof_of(key: bytes, number: int, method: str) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "big") + method.encode(), hashlib.sha256)
