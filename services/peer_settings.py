"""Declares the settings by which processes prove themselves to each other."""

from __future__ import annotations

from dataclasses import dataclass

from services.secrets import Secret, read_secret
from services.settings import Settings, setting


@dataclass(frozen=True)
class PeerSettings(Settings):
    """What every process of a deployment has."""

    peer_secret_file: str = setting(
        "",
        help="file with the secret by which processes know each other, the same for all: `openssl rand -hex 32`, mode"
        " 0600; a second line is accepted from others, too",
        group="secrets",
    )
    peer_secret: str = setting("", help="the same, not in a file", secret=True, group="secrets")

    def read_peer_secret(self) -> Secret | None:
        """Return it, None where there is none. Raises SettingsError."""
        return read_secret("peer_secret", self.peer_secret, self.peer_secret_file)
