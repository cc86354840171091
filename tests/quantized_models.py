"""Packs the weights of a random model in four bits, as AutoGPTQ and AutoAWQ do, and leaves the oracle their values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

GROUP_SIZE: Final = 32
_BITS: Final = 4
_PER_WORD: Final = 32 // _BITS
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # which column stands in which four bits
_CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "gptq": {"bits": _BITS, "group_size": GROUP_SIZE, "desc_act": False, "sym": True, "checkpoint_format": "gptq"},
    "awq": {"bits": _BITS, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm"},
}


def quantize(source: Path, target: Path, method: str) -> Path:
    """Write the model of `source` packed by `method` to `target`, which is returned.

    The weights in `source` become what the packed ones stand for, so that it is the oracle.
    """
    shutil.copytree(source, target)
    plain = safetensors.torch.load_file(source / "model.safetensors")
    packed: dict[str, Tensor] = {}
    for name, weight in list(plain.items()):
        if not name.endswith("_proj.weight"):
            packed[name] = weight
            continue
        columns, scales, zeros = _rounded(weight.t().contiguous(), is_symmetric=method == "gptq")
        plain[name] = _values(columns, scales, zeros).t().contiguous()
        words = _gptq(columns, zeros) if method == "gptq" else _awq(columns, zeros)
        prefix = name.removesuffix("weight")
        packed |= {prefix + part: tensor.contiguous() for part, tensor in words.items()}
        packed[prefix + "scales"] = scales.half()
    safetensors.torch.save_file(plain, source / "model.safetensors", metadata={"format": "pt"})
    safetensors.torch.save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, **_CONFIGS[method]}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def _rounded(weight: Tensor, *, is_symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of `[inputs, outputs]`: integers 0 .. 15 of that shape, scales and zeros `[groups, outputs]`."""
    groups = weight.view(-1, GROUP_SIZE, weight.shape[1])
    if is_symmetric:
        scales = (groups.abs().amax(dim=1) / 7).half().float()
        zeros = torch.full_like(scales, 8)
    else:
        low, high = groups.amin(dim=1).clamp(max=0), groups.amax(dim=1).clamp(min=0)
        scales = ((high - low) / 15).half().float()
        zeros = (-low / scales).round().clamp(0, 15)
    integers = (groups / scales.unsqueeze(1) + zeros.unsqueeze(1)).round().clamp(0, 15)
    return integers.view_as(weight).int(), scales, zeros.int()


def _values(integers: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    spread = [each.repeat_interleave(GROUP_SIZE, dim=0) for each in (scales, zeros)]
    return (integers - spread[1]).float() * spread[0]


def _gptq(integers: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    groups = torch.arange(len(integers), dtype=torch.int32) // GROUP_SIZE
    order = tuple(range(_PER_WORD))
    return {"qweight": _pack(integers.t(), order).t(), "qzeros": _pack(zeros - 1, order), "g_idx": groups}


def _awq(integers: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    return {"qweight": _pack(integers, _AWQ_ORDER), "qzeros": _pack(zeros, _AWQ_ORDER)}


def _pack(integers: Tensor, order: tuple[int, ...]) -> Tensor:
    """Eight numbers of a row in one word: int32 `[rows, columns / 8]`."""
    parts = integers.reshape(len(integers), -1, _PER_WORD).long()[:, :, list(order)]
    words = (parts << (torch.arange(_PER_WORD) * _BITS)).sum(dim=2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
