"""Compiles the libraries, for setup.py (which runs this file by itself) and for tests. Imports nothing of ours."""

from __future__ import annotations

import platform
import zlib
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).parent / "csrc"

# A fused multiply-add here and not there would make a token depend on its place in the batch: no contraction. Nobody
# looks at floating-point exceptions or errno, and caring for them keeps loops with a condition from being vectorized.
FLAGS: Final = (
    "-std=c11",
    "-D_GNU_SOURCE",
    "-O3",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)
_AVX512: Final = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512")
VARIANT_FLAGS: Final = {
    "portable": (),
    "neon": (),
    "avx2": ("-mavx2", "-mfma", "-mbmi2"),
    "avx512": _AVX512,
    "amx": (*_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
_VARIANTS: Final = {"x86_64": ("portable", "avx2", "avx512", "amx"), "aarch64": ("portable", "neon")}


def variants(machine: str = platform.machine()) -> tuple[str, ...]:
    """Return the libraries that are built for processors of an architecture, as Linux calls it."""
    return _VARIANTS.get(machine, ("portable",))


def source_digest() -> int:
    """Return a number that changes with the sources: a library that was built from others is refused."""
    digest = 0
    for path in sorted(SOURCES.iterdir()):
        digest = zlib.crc32(path.name.encode() + path.read_bytes(), digest)
    return digest


def compile_flags(variant: str) -> list[str]:
    """Return what the compiler is told for `variant`."""
    return [*FLAGS, *VARIANT_FLAGS[variant], f"-DTANDEM_SOURCE_DIGEST={source_digest()}u"]
