"""`tandem up`: the whole stack on one machine, planned, started, watched and ended."""

from services.cli.up.placement import available_cores
from services.cli.up.up import StartFailed, choose_model, claim_port

__all__ = ["StartFailed", "available_cores", "choose_model", "claim_port"]
