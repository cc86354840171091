"""Says which C kernels a processor can run and where they lie, without loading them. No torch."""

from __future__ import annotations

import importlib.machinery
from collections.abc import Set
from pathlib import Path
from typing import Final

# What each library's instructions are called in /proc/cpuinfo, fastest first.
_AVX512: Final = frozenset(
    {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni", "fma", "bmi2"}
)
REQUIRED_FLAGS: Final = {
    "amx": _AVX512 | {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512": _AVX512,
    "avx2": frozenset({"avx2", "fma", "bmi2"}),
    "neon": frozenset({"asimd"}),
}
AUTOMATIC: Final = ("amx", "avx512", "avx2")
"""What is taken without being named: faster than torch where it was measured. The kernels for ARM were not."""

NOT_BUILT: Final = "a C compiler was missing when tandem was installed"


def lacking(variant: str, flags: Set[str]) -> list[str]:
    """Return what a variant's library needs and a processor with these flags does not have, sorted."""
    return sorted(REQUIRED_FLAGS[variant] - flags)


def library_path(variant: str) -> Path | None:
    """Return where the installation put the library of a variant; None: it was not built."""
    directory = Path(__file__).parent / "native" / "kernels"
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = directory / f"_{variant}{suffix}"
        if path.is_file():
            return path
    return None
