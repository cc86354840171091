"""Makes and checks a block's proof: made once, where its bytes are computed, and carried to their last use.

    engine computes -> paged pool -> lease -> reader's pool, host tier -> ...       workers check it before first use
                                       └-> store's memory, disk -> lease -> ...     stores keep it and pass it on

A proof says that somebody who has the key computed these bytes for this subject: a block's hash, or for the partial
last block of a prompt, which has none, its place in its transfer. Workers have the key. A store, or whoever else holds
blocks, has not: it cannot give zeros, another block, another block's proof or what it kept from an earlier transfer for
what it was asked for.

    proof = PRF(key, subject, size, sums of the block's rows), 64 bits          PRF: keyed BLAKE2b

The sums (`row_sums.py`) differ for two blocks except with probability 2**-66, and are shown to nobody. So a forged
proof is right with probability 2**-64 + n * 2**-66, where n is the number of different blocks that the forger has seen
proven for this very subject; and each wrong one is seen, counted, and costs its holder the worker's trust for a while.

Why PRF(key, subject, sums), and not sums + PRF(key, subject), as Wegman and Carter have it (1981, "New hash functions
and their use in authentication and set equality"): one block hash is computed by several workers, and processors of
different kinds round differently. Two blocks under one pad give away the difference of their sums, which forges a third
(Joux 2006, "Authentication failures in NIST version of GCM"). Sums within the PRF cost the same and may repeat (Black,
Halevi, Krawczyk, Krovetz and Rogaway 1999, "UMAC: fast and secure message authentication").
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Final, NewType

from kvstore.block.hash import BlockHash
from kvstore.block.memory import BlockMemory
from kvstore.block.row_sums import Multipliers

Proof = NewType("Proof", int)
Subject = NewType("Subject", bytes)
"""What a proof is for."""

MAX_PROOF: Final = (1 << 64) - 1
MIN_KEY_BYTES: Final = 16

_PROOF_PERSON: Final = b"tandem.proof.1"
_PUBLIC: Final = b"tandem: proofs under this key keep out accidents, and nobody who means harm"


def subject_of(block_hash: BlockHash | None, transfer_id: bytes = b"", index: int = 0) -> Subject:
    """What a block's proof is for: its hash, or its place in one transfer, which has to be given, where it has none."""
    if block_hash is not None:
        return Subject(b"h" + block_hash)
    assert transfer_id, "a block without a hash is proven for a transfer"
    return Subject(b"t" + index.to_bytes(8, "little") + transfer_id)


class ProofKey:
    """A key that proofs are made and checked under. Equal keys have equal ids, which tell nothing else of them."""

    def __init__(self, secret: bytes) -> None:
        """Raises ValueError for a secret of less than `MIN_KEY_BYTES`; it has to be random."""
        if len(secret) < MIN_KEY_BYTES:
            raise ValueError(f"a proof key needs {MIN_KEY_BYTES} bytes at least, not {len(secret)}")
        self._secret = secret
        self._prf_key = self._derive(b"prf", 64)
        self.key_id: str = self._derive(b"id", 8).hex()

    @classmethod
    @functools.cache
    def public(cls) -> ProofKey:
        """The key that everybody knows, for workers that reach none but their own machine and were given none."""
        return cls(_PUBLIC)

    @property
    def is_public(self) -> bool:
        """Whether anybody can make proofs under it."""
        return self._secret == _PUBLIC

    def prove(self, memory: BlockMemory, block_ids: Sequence[int], subjects: Sequence[Subject]) -> list[Proof]:
        """Return the proofs of blocks whose bytes were just made: a pass over them. Waits for the device."""
        sums = memory.sums(block_ids, self._multipliers)
        size = memory.block_bytes.to_bytes(8, "little")
        return [self._tag(subject, size, each) for subject, each in zip(subjects, sums, strict=True)]

    def find_wrong(
        self, memory: BlockMemory, block_ids: Sequence[int], subjects: Sequence[Subject], proofs: Sequence[Proof]
    ) -> list[int]:
        """Return the positions in `block_ids` of blocks that their proofs do not prove."""
        made = self.prove(memory, block_ids, subjects)
        pairs = enumerate(zip(made, proofs, strict=True))
        return [position for position, (ours, given) in pairs if ours != given]

    @functools.cached_property
    def _multipliers(self) -> Multipliers:
        return Multipliers.of(self._derive(b"multipliers", 64))

    def _derive(self, purpose: bytes, num_bytes: int) -> bytes:
        return hashlib.shake_256(b"tandem.proof.key." + purpose + b"\0" + self._secret).digest(num_bytes)

    def _tag(self, subject: Subject, size: bytes, sums: bytes) -> Proof:
        # The lengths of size and sums are the layout's, so nothing can be read in two ways.
        message = size + sums + subject
        tag = hashlib.blake2b(message, digest_size=8, key=self._prf_key, person=_PROOF_PERSON).digest()
        return Proof(int.from_bytes(tag, "little"))
