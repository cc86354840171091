"""Guesses tokens that the model then confirms, several in a step: how, how many, and what came of them. Pure."""

from services.engine.native.speculation.draft_model import DraftModelSpeculation
from services.engine.native.speculation.ngrams import NgramSpeculation
from services.engine.native.speculation.speculation import (
    TO_BE_DRAFTED,
    Candidate,
    DraftChunk,
    Guesses,
    Plan,
    Speculation,
)

__all__ = [
    "TO_BE_DRAFTED",
    "Candidate",
    "DraftChunk",
    "DraftModelSpeculation",
    "Guesses",
    "NgramSpeculation",
    "Plan",
    "Speculation",
]
