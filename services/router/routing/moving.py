"""Says where a live request could go on that has to leave its decode worker. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from services.router.routing.candidates import DecodeCandidate, holds
from services.router.routing.numerics import prefer_equal


def places_to_move_to(
    leaves: DecodeCandidate, others: Sequence[DecodeCandidate], model: str, num_blocks: int, num_final_tokens: int
) -> Sequence[DecodeCandidate]:
    """Return who can take a request of so many blocks, and at once: those that compute as its worker does, if any can.

    `num_final_tokens`: of prompt and output at most.

    Each request there may want a block more within a few steps; what is left for those is not taken.
    """
    able = [
        other
        for other in others
        if other.worker_id != leaves.worker_id
        and other.connected
        and not other.draining
        and other.moves
        and model in other.model_names
        and other.model_fingerprint == leaves.model_fingerprint
        and holds(other, num_final_tokens)
        and other.num_outstanding < other.max_num_seqs
        and num_blocks + other.num_outstanding < other.num_free_blocks
    ]
    return prefer_equal(leaves.numerics, able)
