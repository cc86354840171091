"""The C parts, built along with the package; all else is in pyproject.toml.

They are bound with ctypes: no Python or torch header is needed. Each is optional: where it does not compile (no
compiler, a processor of another kind), the installation goes on: workers compute with torch and say so, and blocks are
summed by numpy.
"""

import runpy
from pathlib import Path

from setuptools import Extension, setup

build = runpy.run_path("services/engine/native/build.py")
KERNELS = Path("services/engine/native/kernels/csrc")
SAMPLER = Path("services/engine/native/sampling/csrc")

setup(
    ext_modules=[
        Extension(
            f"services.engine.native.kernels._{variant}",
            [str(KERNELS / f"{variant}.c")],
            depends=sorted(str(path) for path in KERNELS.iterdir()),
            extra_compile_args=build["kernel_flags"](variant),
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
        )
        for variant in build["variants"]()
    ]
    + [
        Extension(
            "kvstore.block._row_sums",
            ["kvstore/block/row_sums.c"],
            extra_compile_args=["-std=gnu11", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"],
            optional=True,
        ),
        Extension(
            "services.engine.native.sampling._sampler",
            [str(SAMPLER / "sampler.c")],
            depends=sorted(str(path) for path in SAMPLER.iterdir()),
            extra_compile_args=build["sampler_flags"](),
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
        ),
    ]
)
