"""What a worker or a store node says of itself in the registry."""

from __future__ import annotations

from kvstore.registry import WorkerRecord


def worker_record(**fields: object) -> WorkerRecord:
    """A prefill worker's record, except for what `fields` says."""
    usual: dict[str, object] = {
        "worker_id": "prefill-0",
        "role": "prefill",
        "incarnation": "0001",
        "served_model_names": ("m",),
        "model_path": "/models/m",
        "tokenizer_path": "/models/m",
        "model_fingerprint": "ab12",
        "grpc_address": "127.0.0.1:1",
        "kv_address": "127.0.0.1:2",
        "http_address": "127.0.0.1:3",
        "block_size": 32,
        "num_blocks": 64,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "dtype": "float32",
        "transports": ("ucxx",),
    }
    return WorkerRecord(**usual | fields)  # type: ignore[arg-type]
