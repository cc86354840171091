"""The model: loads weights and computes with them by torch or C kernels, chosen once at load."""

from services.engine.native.model.fingerprint import FingerprintBuilder
from services.engine.native.model.model import ComputePath, LoadedModel, load_model

__all__ = ["ComputePath", "FingerprintBuilder", "LoadedModel", "load_model"]
