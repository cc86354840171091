"""The random models that benches run: Qwen2 of 0.39 B parameters in bfloat16, and of 0.06 B."""

from __future__ import annotations

from pathlib import Path

from tests.hf_models import write_model


def write_bench_model(directory: Path) -> Path:
    """Write it below `directory`, 770 MB, and return where."""
    return write_model(
        directory / "qwen2-0.4b",
        "qwen2_tied",
        dtype="bfloat16",
        vocab_size=32_000,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )


def write_small_bench_model(directory: Path) -> Path:
    """Write one of 0.06 B below `directory`, 130 MB, and return where."""
    return write_model(
        directory / "qwen2-0.06b",
        "qwen2_tied",
        dtype="bfloat16",
        vocab_size=32_000,
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=10,
        num_attention_heads=10,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
