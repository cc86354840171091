"""The CPU kernels, built along with the package; all else is in pyproject.toml.

They are C, bound with ctypes: no Python or torch header is needed. Each is optional: where it does not compile (no
compiler, a processor of another kind), the installation goes on, and workers compute with torch and say so.
"""

import runpy
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("services/engine/native/kernels/csrc")
build = runpy.run_path("services/engine/native/kernels/build.py")

setup(
    ext_modules=[
        Extension(
            f"services.engine.native.kernels._{variant}",
            [str(SOURCES / f"{variant}.c")],
            depends=sorted(str(path) for path in SOURCES.iterdir()),
            extra_compile_args=build["compile_flags"](variant),
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
        )
        for variant in build["VARIANT_FLAGS"]
    ]
)
