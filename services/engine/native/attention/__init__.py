"""Attends over paged KV: describes a forward pass's batch, and computes its attention."""

from services.engine.native.attention.attention import Attention, AttentionStep, GatherAttention
from services.engine.native.attention.forward import ForwardBatch
from services.engine.native.attention.varlen_attention import choose_cuda_attention

__all__ = ["Attention", "AttentionStep", "ForwardBatch", "GatherAttention", "choose_cuda_attention"]
