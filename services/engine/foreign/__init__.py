"""What adapters of other projects' engines share: the books that such an engine lacks.

live.py         a request from its order to its end, its hashes, and the order in which reservations get their turn
proofs.py       proofs of blocks, by block id
fingerprint.py  tells models apart whose files the adapter does not read itself
"""

from services.engine.foreign.fingerprint import model_fingerprint
from services.engine.foreign.live import Live, Place, Turns, is_nobodys
from services.engine.foreign.proofs import ProofBook

__all__ = ["Live", "Place", "ProofBook", "Turns", "is_nobodys", "model_fingerprint"]
