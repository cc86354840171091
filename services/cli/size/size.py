"""`tandem size`: prints what a model needs in KV memory, bandwidth, Redis and store memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from services.cli.config import DEMO_MODEL, SizeConfig
from services.settings import load_settings, refuse

if TYPE_CHECKING:
    from services.cli.size.sizing import Sizes


def main(argv: Sequence[str]) -> int:
    """Prints the sizes; returns 1 where the model does not fit, 2 where it cannot be had or served, else 0."""
    description = "Sizes a deployment from the model's config.json: no weights, no GPU."
    config = load_settings(SizeConfig, argv, prog="tandem size", description=description)
    # Here and not above: --help must not pay for them.
    from kvstore.errors import KVStoreError
    from services.cli.size.sizing import size
    from services.engine.checkpoint import CONFIGURATION, find_model
    from services.engine.model_config import ModelError, read_config

    try:
        directory = find_model(config.model or str(DEMO_MODEL), config.revision, CONFIGURATION)
        draft = find_model(config.speculative_model, "", CONFIGURATION) if config.speculative_model else None
        sizes = size(read_config(directory), config, read_config(draft) if draft is not None else None)
    except (ModelError, KVStoreError) as error:
        refuse("tandem size", error)
    print(json.dumps(asdict(sizes), indent=2) if config.json else table(sizes, config))
    return 0 if sizes.fits else 1


def table(sizes: Sizes, config: SizeConfig) -> str:
    """The sizes for people, in groups."""
    pool = "--kv-cache-memory-bytes" if config.kv_cache_memory_bytes else f"of {_bytes(config.gpu_memory_bytes)}"
    groups: dict[str, list[tuple[str, str]]] = {
        f"Model, {sizes.dtype}{'' if sizes.kv_cache_dtype == sizes.dtype else f', KV {sizes.kv_cache_dtype}'}": [
            ("weights", _bytes(sizes.weight_bytes)),
            *_of_draft(sizes),
            ("context", f"{sizes.context_tokens:,} tokens"),
            ("KV per token", _bytes(sizes.kv_bytes_per_token)),
            (f"KV per block of {sizes.block_tokens}", _bytes(sizes.block_bytes)),
        ],
        f"One worker, {pool}": [
            ("KV pool", f"{_bytes(sizes.kv_pool_bytes_per_worker)}: {sizes.num_blocks_per_worker:,} blocks"),
            ("tokens", f"{sizes.num_tokens_per_worker:,}"),
            (f"requests of {sizes.context_tokens:,} tokens", f"{sizes.max_concurrent_at_context:,}"),
            (f"requests of {config.prompt_tokens:,} tokens", f"{sizes.max_concurrent_at_prompt:,}"),
            (f"KV of {sizes.max_num_seqs} full requests", _bytes(sizes.kv_bytes_for_max_num_seqs)),
        ],
        f"Handoff of {config.prompt_tokens:,} tokens at {config.bandwidth_gbit_per_s:g} Gbit/s": [
            ("blocks", f"{sizes.handoff_blocks:,}"),
            ("bytes", _bytes(sizes.handoff_bytes)),
            ("time on the wire", f"{sizes.handoff_seconds * 1e3:,.2f} ms"),
            ("handoffs per second", f"{sizes.max_handoffs_per_s:,.0f} at most"),
        ],
        f"Prefix index in Redis, {config.num_workers} holders": [
            ("blocks", f"{sizes.index_blocks:,}"),
            ("memory", _bytes(sizes.index_bytes)),
        ],
        f"Store nodes, {_bytes(config.store_dram_bytes)} in all": [
            ("blocks", f"{sizes.store_blocks:,}"),
            ("bookkeeping beside them", _bytes(sizes.store_bookkeeping_bytes)),
            (f"window at {config.request_rate:g} requests/s", _seconds(sizes.store_window_seconds)),
        ],
    }
    width = max(len(name) for rows in groups.values() for name, _ in rows) + 2
    lines = []
    for title, rows in groups.items():
        lines += [title, *(f"  {name:<{width}}{value}" for name, value in rows), ""]
    if not sizes.weights_fit:
        budget = int(config.gpu_memory_bytes * config.gpu_memory_utilization)
        needed = sizes.weight_bytes + sizes.draft_weight_bytes
        lines.append(
            f"The weights do not fit: they need {_bytes(needed)}, and a worker has {_bytes(budget)}"
            f" ({config.gpu_memory_utilization:g} of {_bytes(config.gpu_memory_bytes)}): take a smaller model,"
            " or give more memory (--gpu-memory-bytes)."
        )
    elif not sizes.fits:
        lines.append("One request of full length does not fit: lower --max-model-len or give more memory.")
    return "\n".join(lines).rstrip()


def _of_draft(sizes: Sizes) -> list[tuple[str, str]]:
    if not sizes.draft_weight_bytes:
        return []
    return [
        ("weights of the draft model", _bytes(sizes.draft_weight_bytes)),
        ("its KV per block", _bytes(sizes.draft_block_bytes)),
    ]


def _bytes(number: int) -> str:
    exponent = min(max(number.bit_length() - 1, 0) // 10, 4)
    value = number / 1024**exponent
    return f"{value:,.{0 if value.is_integer() else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent]}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
