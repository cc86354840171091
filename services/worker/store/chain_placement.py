"""Chooses the store node that keeps a chain of blocks. Pure, and the same on every worker.

Rendezvous hashing (Thaler and Ravishankar 1998) of one block of the chain: nodes may come and go, and only the chains
of that node move. A chain is whole on its node, since a lookup counts a holder's prefix from the first block. Were the
first block the one that is hashed, all that follows one system prompt would be on one node; so it is one further on:

    blocks in the chain        1 .. 32    33 .. 256    257 .. 2,048    more
    the one that is hashed     0          32           256             2,048

Chains that part before that block are spread, and each of their nodes has a copy of what they share. A chain that grows
past a step is copied to another node; the steps lie far apart, so a conversation of 8,192 tokens pays for it once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from kvstore.block import BlockHash
from services.worker.store.chain_book import ChainOffer

_STEPS: Final = (2048, 256, 32, 0)


def node_of_chain(offer: ChainOffer, node_ids: Iterable[str]) -> str:
    """The store node that keeps the chain. There must be one.

    Of a chain whose head is not known here, nobody knows its blocks' places: the parent of the first one decides.
    """
    placing = offer.parent_hash or next(offer.hashes[step] for step in _STEPS if step < len(offer.hashes))
    return max(node_ids, key=lambda node_id: _score(node_id, placing))


def _score(node_id: str, block_hash: BlockHash) -> bytes:
    return hashlib.blake2b(node_id.encode() + b"\0" + block_hash, digest_size=8).digest()
