"""The C kernels: built at install, chosen by the processor, checked before use."""

from services.engine.native.kernels.choice import choose_kernels
from services.engine.native.kernels.library import (
    AppendCall,
    AttentionCall,
    Epilogue,
    ForwardCall,
    KernelLibrary,
    Layer,
    Stage,
    Workspace,
)
from services.engine.native.kernels.projection import MAX_INT8_DEPTH, Projection

__all__ = [
    "MAX_INT8_DEPTH",
    "AppendCall",
    "AttentionCall",
    "Epilogue",
    "ForwardCall",
    "KernelLibrary",
    "Layer",
    "Projection",
    "Stage",
    "Workspace",
    "choose_kernels",
]
