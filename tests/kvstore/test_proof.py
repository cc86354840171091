"""A proof is for these bytes and this subject, under this key: nothing that holds blocks without the key makes one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvstore.block import (
    MAX_PROOF,
    BlockHash,
    HostMemory,
    Proof,
    ProofKey,
    checksum,
    checksums,
    find_changed,
    subject_of,
)

KEY = ProofKey(bytes(range(32)))
HASHES = [BlockHash(bytes([number]) * 16) for number in range(4)]
SUBJECTS = [subject_of(block_hash) for block_hash in HASHES]


def random_memory(num_blocks: int = 4, block_bytes: int = 8192 + 512) -> HostMemory:
    memory = HostMemory.allocate(num_blocks, block_bytes)
    memory.array[:] = np.random.default_rng(5).integers(0, 256, memory.array.shape, dtype=np.uint8)
    return memory


def test_golden_values_hold_for_ever() -> None:
    memory = HostMemory.allocate(2, 64)
    memory.view(1)[:] = np.arange(64, dtype=np.uint8)
    assert KEY.key_id == "2e2e3a939efe67ef"
    assert KEY.prove(memory, [0, 1], SUBJECTS[:2]) == [0xAEF018FEA021257E, 0x9DD55583E491AF22]
    assert checksums(memory, [0, 1]) == [0xE7494F907A55052, 0xFDBC9D4432D7EA41]


def test_a_proof_proves_its_block_and_no_other_and_tells_which_is_wrong() -> None:
    memory = random_memory()
    proofs = KEY.prove(memory, range(4), SUBJECTS)
    assert KEY.find_wrong(memory, range(4), SUBJECTS, proofs) == []
    assert KEY.prove(memory, [2, 0], [SUBJECTS[2], SUBJECTS[0]]) == [proofs[2], proofs[0]]
    assert all(0 <= proof <= MAX_PROOF for proof in proofs)
    memory.view(2)[8191] ^= 0x80
    assert KEY.find_wrong(memory, range(4), SUBJECTS, proofs) == [2]
    assert KEY.find_wrong(memory, [3, 2], SUBJECTS[2:][::-1], proofs[2:][::-1]) == [1]


def test_zeros_swapped_blocks_and_swapped_proofs_are_wrong() -> None:
    memory = random_memory()
    proofs = KEY.prove(memory, range(4), SUBJECTS)
    assert KEY.find_wrong(memory, [1, 0], SUBJECTS[:2], proofs[:2]) == [0, 1], "swapped blocks"
    assert KEY.find_wrong(memory, [0, 1], SUBJECTS[:2], proofs[1::-1]) == [0, 1], "swapped proofs"
    assert KEY.find_wrong(memory, [1, 0], SUBJECTS[:2], proofs[1::-1]) == [0, 1], "both: good blocks under other names"
    memory.array[:] = 0
    forged = [Proof(0), *proofs[1:]]
    assert KEY.find_wrong(memory, range(4), SUBJECTS, forged) == [0, 1, 2, 3], "zeros"


def test_a_block_without_a_hash_is_proven_for_one_place_in_one_transfer() -> None:
    memory = random_memory(1)
    here = subject_of(None, b"t" * 16, 3)
    others = [
        subject_of(None, b"t" * 16, 4),
        subject_of(None, b"u" * 16, 3),
        SUBJECTS[0],
        subject_of(BlockHash(b"t" * 16)),
    ]
    (proof,) = KEY.prove(memory, [0], [here])
    assert KEY.find_wrong(memory, [0], [here], [proof]) == []
    for other in others:
        assert KEY.find_wrong(memory, [0], [other], [proof]) == [0]


def test_another_key_proves_nothing_and_has_another_id() -> None:
    memory = random_memory()
    keys = [KEY, ProofKey(bytes(range(1, 33))), ProofKey(bytes(range(33))), ProofKey.public()]
    proofs = [tuple(key.prove(memory, range(4), SUBJECTS)) for key in keys]
    assert len({key.key_id for key in keys}) == len({proof for each in proofs for proof in each}) / 4 == 4
    assert ProofKey(bytes(range(32))).prove(memory, range(4), SUBJECTS) == list(proofs[0])
    assert [key.is_public for key in keys] == [False, False, False, True]


def test_a_key_that_can_be_guessed_is_refused_and_none_is_ever_shown() -> None:
    with pytest.raises(ValueError, match="needs 16 bytes at least, not 15"):
        ProofKey(bytes(15))
    secret = b"0123456789abcdef0123456789abcdef"
    assert "0123456789abcdef" not in repr(ProofKey(secret)) + ProofKey(secret).key_id


def test_what_two_workers_make_of_one_block_forges_no_third() -> None:
    # One hash, two roundings: with sums + PRF(hash) the difference of their proofs is that of their sums, and adding
    # the difference of the blocks to any other proven block needs no key.
    memory = HostMemory.allocate(4, 8192)
    words = memory.array.view("<u4")
    words[:] = np.random.default_rng(6).integers(2**8, 2**31, words.shape, dtype=np.uint32)
    difference = np.random.default_rng(7).integers(0, 2**8, words.shape[1], dtype=np.uint32)
    words[1] = words[0] + difference
    words[3] = words[2] + difference
    one, two = KEY.prove(memory, [0, 1], [SUBJECTS[0]] * 2)
    (known,) = KEY.prove(memory, [2], [SUBJECTS[1]])
    forged = Proof((known + two - one) % 2**64)
    assert KEY.find_wrong(memory, [3], [SUBJECTS[1]], [forged]) == [0]


def test_no_two_subjects_are_one() -> None:
    transfers = [b"t" * length for length in (1, 8, 16, 24, 64)]
    subjects = [subject_of(None, each, index) for each, index in itertools.product(transfers, (0, 1, 0x74, 2**32))]
    subjects += [subject_of(BlockHash(each)) for each in transfers]
    assert len(set(subjects)) == len(subjects)


def test_a_block_without_a_name_is_not_proven_for_nothing() -> None:
    with pytest.raises(AssertionError, match="is proven for a transfer"):
        subject_of(None)


def test_a_checksum_sees_what_has_changed_and_needs_no_key() -> None:
    memory = random_memory()
    before = checksums(memory, [3, 1])
    assert before == [checksum(memory.view(3)), checksum(memory.view(1))]
    assert find_changed(memory, [3, 1], before) == []
    memory.view(1)[[7, 15]] ^= 0x80  # the top bits of two words
    assert find_changed(memory, [3, 1], before) == [1]
