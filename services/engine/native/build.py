"""Says how the C libraries are compiled, to setup.py (which runs this file by itself), to their loaders, and to tests.

Imports nothing of ours.
"""

from __future__ import annotations

import platform
import zlib
from pathlib import Path
from typing import Final

KERNEL_SOURCES: Final = Path(__file__).parent / "kernels" / "csrc"
SAMPLER_SOURCES: Final = Path(__file__).parent / "sampling" / "csrc"

# A fused multiply-add here and not there would make a token depend on its place in the batch, and the sampler's edits
# are the definition's single operations: no contraction. Nobody looks at floating-point exceptions or errno, and caring
# for them keeps loops with a condition from being vectorized.
_COMMON: Final = (
    "-O3",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
)
KERNEL_FLAGS: Final = ("-std=c11", "-D_GNU_SOURCE", *_COMMON, "-Wno-psabi")
"""Of all variants."""
_AVX512: Final = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512")
_VARIANT_FLAGS: Final = {
    "portable": (),
    "neon": (),
    "avx2": ("-mavx2", "-mfma", "-mbmi2"),
    "avx512": _AVX512,
    "amx": (*_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
_VARIANTS: Final = {"x86_64": ("portable", "avx2", "avx512", "amx"), "aarch64": ("portable", "neon")}


def variants(machine: str = platform.machine()) -> tuple[str, ...]:
    """Return the kernels that are built for processors of an architecture, as Linux calls it."""
    return _VARIANTS.get(machine, ("portable",))


def kernel_flags(variant: str) -> list[str]:
    """Return what the compiler is told for the kernels of `variant`."""
    return [*KERNEL_FLAGS, *_VARIANT_FLAGS[variant], _digest_flag(KERNEL_SOURCES)]


def sampler_flags() -> list[str]:
    """Return what the compiler is told for the sampler."""
    return ["-std=gnu11", *_COMMON, _digest_flag(SAMPLER_SOURCES)]


def source_digest(sources: Path) -> int:
    """Return a number that changes with the files in `sources`: a library that was built from others is refused."""
    digest = 0
    for path in sorted(sources.iterdir()):
        digest = zlib.crc32(path.name.encode() + path.read_bytes(), digest)
    return digest


def _digest_flag(sources: Path) -> str:
    return f"-DTANDEM_SOURCE_DIGEST={source_digest(sources)}u"
