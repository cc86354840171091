"""`tandem up`: plans, starts, watches and ends the whole stack on one machine."""

from services.cli.up.placement import available_cores
from services.cli.up.preflight import check_tokenizer
from services.cli.up.up import choose_model

__all__ = ["available_cores", "check_tokenizer", "choose_model"]
