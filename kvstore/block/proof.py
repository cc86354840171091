"""Makes and checks a block's proof, computed once where its bytes are born and carried to their last use.

    engine computes -> paged pool -> lease -> reader's pool, host tier, store's memory, disk -> lease -> ...

Nobody on that way computes it anew: whoever reads the block next sees a flipped bit, and the holder that is told
(`Suspect`) drops it. Today the proof is the payload digest (`digest`); this module alone knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NewType

import numpy as np
import numpy.typing as npt

from kvstore.block.digest import digest_rows
from kvstore.block.memory import BlockMemory

Proof = NewType("Proof", int)

MAX_PROOF = (1 << 64) - 1


def prove(memory: BlockMemory, block_ids: Sequence[int]) -> list[Proof]:
    """Return the proofs of blocks whose bytes were just made: a pass over them. Waits for the device."""
    return [Proof(digest) for digest in memory.digests(block_ids)]


def find_wrong(memory: BlockMemory, block_ids: Sequence[int], proofs: Sequence[Proof]) -> list[int]:
    """Return the positions in `block_ids` of blocks whose bytes are not those that their proofs were made of."""
    return [
        position
        for position, (digest, proof) in enumerate(zip(memory.digests(block_ids), proofs, strict=True))
        if digest != proof
    ]


def proves(proof: Proof, payload: memoryview | npt.NDArray[np.uint8]) -> bool:
    """Whether these are the bytes of one block that the proof was made of."""
    return digest_rows(np.frombuffer(payload, dtype="<i8").reshape(1, -1)) == [proof]
