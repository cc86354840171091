"""Compiles the sampler's library, for setup.py (which runs this file by itself) and for tests.

Imports nothing of ours.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).parent / "csrc"

# No contraction: edits and scaling are the definition's single operations in float32. Caring for floating-point
# exceptions or errno keeps loops with a condition from being vectorized.
_FLAGS: Final = (
    "-std=gnu11",
    "-O3",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
)


def source_digest() -> int:
    """Return a number that changes with the sources: a library that was built from others is not used."""
    digest = 0
    for path in sorted(SOURCES.iterdir()):
        digest = zlib.crc32(path.name.encode() + path.read_bytes(), digest)
    return digest


def compile_flags() -> list[str]:
    """Return what the compiler is told."""
    return [*_FLAGS, f"-DTANDEM_SOURCE_DIGEST={source_digest()}u"]
