"""Names the arithmetic that makes a model's logits, so that others know whether theirs is the same."""

from __future__ import annotations

from typing import Final

import torch

from services.engine.native.build import KERNEL_SOURCES, source_digest

# Raise it with every change of this engine that may change a bit of a logit, or the token that is sampled from them.
# Changes of the C kernels are seen without it.
_ARITHMETIC: Final = 1


def numerics_id(kernels: str, dtype: str, quantization: str, kv_cache_dtype: str, device: torch.device) -> str:
    """Return the name: `native-1/bfloat16/none/amx/5f3a9c11`, with `/kv-int8` behind it for a cache in 8 bits.

    Two workers of one model and one name compute the same bits where it is one of C kernels. Torch's results depend on
    its version, the instructions that it finds, how it splits sums over threads, and how many rows it computes at once:
    its names tell who computes as nearly alike as can be, and promise nothing.
    """
    if kernels != "torch":
        details = [kernels, f"{source_digest(KERNEL_SOURCES):08x}"]
    elif device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability().replace(" ", "-")
        details = [f"torch-{torch.__version__}", capability, f"{torch.get_num_threads()}-threads"]
    else:
        name = torch.cuda.get_device_properties(device).name.replace(" ", "-")
        details = [f"torch-{torch.__version__}", f"cuda-{torch.version.cuda}", name]
    if kv_cache_dtype != "auto":
        details.append(f"kv-{kv_cache_dtype}")
    return "/".join([f"native-{_ARITHMETIC}", dtype, quantization, *details])
