"""The model: weights, and the two computations over them (torch, C kernels), chosen once at load."""

from services.engine.native.model.model import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
