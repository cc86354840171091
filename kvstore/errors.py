"""Defines the block store's errors. What a peer, a user or the network can cause is a `KVStoreError`."""

from __future__ import annotations


class KVStoreError(Exception):
    """Base of all errors that this package raises on purpose."""


class InvalidLayout(KVStoreError, ValueError):
    """A block layout with impossible values: ours from a wrong configuration, or a peer's from its wire form."""


class IncompatibleLayout(KVStoreError):
    """A peer's blocks cannot be used here; the message names the peer and every differing field with both values."""


class OutOfBlocks(KVStoreError):
    """An allocation asked for more blocks than are free or evictable. Nothing was taken."""


class IntegrityError(KVStoreError):
    """The block pool's bookkeeping was violated: a bug of ours, never the result of input."""


class RegistryError(KVStoreError):
    """The registry cannot be used as asked: a malformed URL, record or lease. Redis being away is no such error."""


class InvalidRecord(RegistryError, ValueError):
    """A worker record with missing, unknown or impossible values."""


class RedisServerError(KVStoreError):
    """The embedded Redis server could not be found or started."""


class ExchangeError(KVStoreError):
    """Base of the block protocol's errors."""


class PeerUnreachable(ExchangeError):
    """No connection to a peer could be made; the message names the address and the stage."""


class IncompatiblePeer(ExchangeError):
    """A peer answered and one side refused the other; the message says both sides' values."""


class UnprovenPeer(IncompatiblePeer):
    """A peer has not shown that it has our key, or it has none in common with us."""


class PeerLost(ExchangeError):
    """The connection to a peer is gone, or there never was one."""


class ProtocolViolation(ExchangeError):
    """A peer sent what the block protocol does not allow. Its connection is closed."""


class IllegalTransition(ExchangeError):
    """A state machine met an event that its table rules out: a bug of ours. The message ends with its history."""


class TransportError(ExchangeError):
    """A transport could not start, connect, or carry a read."""


class ReadFailed(TransportError):
    """A read has ended badly. It has really ended: no byte of it can arrive any more."""
