"""What adapters of other projects' engines share: the books that such an engine lacks.

Each is of use by itself:

    live.py         a request from its order to its end, its hashes, and the order in which reservations get their turn
    steps.py        its part in a step
    step_limits.py  budgets kept through the engine's own scheduler
    proofs.py       proofs of blocks, by block id
    findable.py     which hashes can be found, told by the engine's events; whether its books agree with ours
    caches.py       the engine's caches as blocks: viewed, tried out, put together of its ranks' parts
    arrivals.py     blocks that transfers fill: given to all ranks, or wiped
    draws.py        draws by seed and place
    logprobs.py     its log probabilities in our words
    fingerprint.py  tells models apart whose files the adapter does not read itself
    tierless.py     the port's answers of engines without a tier of their own, and their first steps
    uncompiled.py   nothing is compiled in the midst of a step
"""

from services.engine.foreign.arrivals import Arrivals
from services.engine.foreign.caches import (
    NUM_PROBED,
    Kept,
    RankCache,
    byte_view,
    gather_ranks,
    num_holders,
    probe,
    scales_digest,
)
from services.engine.foreign.draws import PlacedGenerator
from services.engine.foreign.findable import Findable, check_books
from services.engine.foreign.fingerprint import model_fingerprint, said_of
from services.engine.foreign.live import Live, Place, Turns
from services.engine.foreign.logprobs import position_logprobs
from services.engine.foreign.proofs import ProofBook
from services.engine.foreign.step_limits import Budgeted
from services.engine.foreign.steps import Part, shape_of
from services.engine.foreign.tierless import Tierless, first_steps
from services.engine.foreign.uncompiled import compile_nothing

__all__ = [
    "NUM_PROBED",
    "Arrivals",
    "Budgeted",
    "Findable",
    "Kept",
    "Live",
    "Part",
    "Place",
    "PlacedGenerator",
    "ProofBook",
    "RankCache",
    "Tierless",
    "Turns",
    "byte_view",
    "check_books",
    "compile_nothing",
    "first_steps",
    "gather_ranks",
    "model_fingerprint",
    "num_holders",
    "position_logprobs",
    "probe",
    "said_of",
    "scales_digest",
    "shape_of",
]
