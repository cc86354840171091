"""The block protocol over TCP: connections to peers, leases on our blocks, fetches of theirs.

One `BlockExchange` per process, in its event loop; the bytes go through `kvstore.transport`."""

from kvstore.exchange.exchange import BlockExchange, RequestScope
from kvstore.exchange.framing import Outside
from kvstore.exchange.handshake import PeerIdentity
from kvstore.exchange.keep import Keep
from kvstore.exchange.observer import ExchangeObserver
from kvstore.exchange.owner import Lease
from kvstore.exchange.reader import Fetch

__all__ = ["BlockExchange", "ExchangeObserver", "Fetch", "Keep", "Lease", "Outside", "PeerIdentity", "RequestScope"]
