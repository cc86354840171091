"""Has torch compile nothing, for engines that are to compute at once and anywhere."""

from __future__ import annotations

import os


def compile_nothing() -> None:
    """What asks torch to compile it is called as it is, here and in processes started from now on.

    Compiling takes seconds, in the midst of a step where a request is the first to want it, and a C++ compiler, without
    which the step fails and the worker ends.
    """
    import torch._dynamo.config  # which takes a second to import

    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    torch._dynamo.config.disable = True
