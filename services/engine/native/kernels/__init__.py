"""The C kernels: built at install, chosen by the processor, checked before use. No torch."""

from services.engine.native.kernels.choice import choose_kernels
from services.engine.native.kernels.library import (
    PANEL_COLUMNS,
    AppendCall,
    AttentionCall,
    Epilogue,
    ForwardCall,
    KernelLibrary,
    Layer,
    Stage,
    Weights,
    Workspace,
)

__all__ = [
    "PANEL_COLUMNS",
    "AppendCall",
    "AttentionCall",
    "Epilogue",
    "ForwardCall",
    "KernelLibrary",
    "Layer",
    "Stage",
    "Weights",
    "Workspace",
    "choose_kernels",
]
