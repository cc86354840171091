"""The model: loads weights and computes with them by torch or C kernels, chosen once at load."""

from services.engine.native.model.model import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
