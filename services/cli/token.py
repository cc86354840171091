"""`tandem token`: prints the bearer token that opens the debug ports of workers and store nodes."""

from __future__ import annotations

from collections.abc import Sequence

from services.cli.config import TokenConfig
from services.settings import SettingsError, load_settings, refuse

_PROG = "tandem token"


def main(argv: Sequence[str]) -> int:
    """Prints it; returns the exit status."""
    config = load_settings(
        TokenConfig, argv, prog=_PROG, description="Print the token for /debug on the HTTP ports of workers and stores."
    )
    try:
        if not (config.peer_secret_file or config.peer_secret):
            raise SettingsError("give --peer-secret-file; where there is none, no token is needed")
        print(config.read_peer_proofs().tokens[0])
    except SettingsError as error:
        refuse(_PROG, error)
    return 0
