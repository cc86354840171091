"""The paced engine, a simulation: real scheduler, pool, blocks and sampler; steps take as long as a profile says.

It needs no weights, and runs more requests at a time than the machine could compute. Its tokens mean nothing, but each
follows from all KV bytes that it should have seen."""

from typing import TYPE_CHECKING

from services.engine.paced.profile import StepProfile, read_profile

if TYPE_CHECKING:
    from services.engine.paced.engine import open_paced

__all__ = ["StepProfile", "open_paced", "read_profile"]


def __getattr__(name: str) -> object:
    """Import the engine, and torch with it, when somebody asks for it: profiles are checked without."""
    if name != "open_paced":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from services.engine.paced.engine import open_paced

    return open_paced
