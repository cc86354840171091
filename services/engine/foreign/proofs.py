"""Keeps the proofs of an engine's blocks: made after the step that filled a block, or come with its bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstore.block import BlockHash, BlockMemory, Proof, ProofKey, Subject, subject_of
from kvstore.protocol import AnnouncedBlock


class ProofBook:
    """Proofs by block id; one counts as long as the block has the hash that it was made for."""

    def __init__(self, memory: BlockMemory, key: ProofKey, hash_of: Callable[[int], BlockHash | None]) -> None:
        """`hash_of`: by which a block can be found now, by its id."""
        self._memory = memory
        self._key = key
        self._hash_of = hash_of
        self._kept: dict[int, tuple[BlockHash, Proof]] = {}

    def keep(self, block_id: int, block_hash: BlockHash, proof: Proof) -> None:
        """Keep a proof that came with the block's bytes."""
        self._kept[block_id] = (block_hash, proof)

    def prove(self, block_ids: Sequence[int]) -> None:
        """Prove findable blocks that the step which has just ended has filled, whatever is kept of what was in them."""
        hashes = {block_id: self._hash_of(block_id) for block_id in block_ids}
        fresh = {block_id: block_hash for block_id, block_hash in hashes.items() if block_hash is not None}
        made = self._key.prove(self._memory, list(fresh), list(map(subject_of, fresh.values())))
        self._kept.update(zip(fresh, zip(fresh.values(), made, strict=True), strict=True))

    def proofs(self, block_ids: Sequence[int], subjects: Sequence[Subject]) -> list[Proof]:
        """As kept, where these blocks are known as these subjects; else made now."""
        known = [self._known(block_id, subject) for block_id, subject in zip(block_ids, subjects, strict=True)]
        fresh = [i for i, proof in enumerate(known) if proof is None]
        made = self._key.prove(self._memory, [block_ids[i] for i in fresh], [subjects[i] for i in fresh])
        by_place = dict(zip(fresh, made, strict=True))
        return [by_place[i] if proof is None else proof for i, proof in enumerate(known)]

    def announced(
        self, block_ids: Sequence[int], hashes: Sequence[BlockHash | None], transfer_id: bytes, first: int
    ) -> tuple[AnnouncedBlock, ...]:
        """Blocks as they are announced in a transfer, from number `first` on; None: its bytes are the transfer's."""
        if not block_ids:
            return ()
        subjects = [subject_of(each, transfer_id, index) for index, each in enumerate(hashes, first)]
        return tuple(map(AnnouncedBlock, block_ids, hashes, self.proofs(block_ids, subjects)))

    def find_wrong(self, block_ids: Sequence[int]) -> list[int]:
        """Return those of these blocks that do not match the proofs that are kept of them."""
        kept = [(block_id, *entry) for block_id in block_ids if (entry := self._entry(block_id)) is not None]
        ids, subjects = [block_id for block_id, _, _ in kept], [subject_of(block_hash) for _, block_hash, _ in kept]
        wrong = self._key.find_wrong(self._memory, ids, subjects, [proof for _, _, proof in kept])
        return [ids[position] for position in wrong]

    def _known(self, block_id: int, subject: Subject) -> Proof | None:
        entry = self._entry(block_id)
        return entry[1] if entry is not None and subject_of(entry[0]) == subject else None

    def _entry(self, block_id: int) -> tuple[BlockHash, Proof] | None:
        """What is kept of the block, unless it has been evicted since."""
        entry = self._kept.get(block_id)
        return entry if entry is not None and entry[0] == self._hash_of(block_id) else None
