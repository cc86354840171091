"""Guesses tokens that the model then confirms, several in a step: how, how many, and what came of them. Pure."""

from services.engine.native.speculation.speculation import Candidate, Guesses, Speculation, SpeculationConfig

__all__ = ["Candidate", "Guesses", "Speculation", "SpeculationConfig"]
