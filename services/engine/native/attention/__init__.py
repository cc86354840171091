"""Attention over paged KV: what a forward pass is told of its batch, and the ways to compute it."""

from services.engine.native.attention.attention import Attention, AttentionStep, GatherAttention
from services.engine.native.attention.forward import ForwardBatch
from services.engine.native.attention.varlen_attention import choose_cuda_attention

__all__ = ["Attention", "AttentionStep", "ForwardBatch", "GatherAttention", "choose_cuda_attention"]
