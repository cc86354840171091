"""Declares the settings by which processes prove themselves to each other, and what is derived of them."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass, field

from kvstore.peer_keys import PeerKeys
from services.secrets import read_secret
from services.settings import Settings, SettingsError, setting

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeerProofs:
    """What processes with the same peer secret know each other by. Nothing where there is no secret."""

    blocks: PeerKeys = field(default_factory=PeerKeys)
    """Of the block protocol."""
    orders: PeerKeys = field(default_factory=PeerKeys)
    tokens: tuple[str, ...] = field(default=(), repr=False)
    """Bearer tokens that open the debug ports; the first is the one to use."""


@dataclass(frozen=True)
class PeerSettings(Settings):
    """What every process of a deployment has."""

    host: str = setting(
        "127.0.0.1", help="address to listen on; another than loopback needs a peer secret", group="network"
    )
    peer_secret_file: str = setting(
        "",
        help="file with the secret by which processes know each other, the same for all: `openssl rand -hex 32`, mode"
        " 0600; a second line is accepted from others, too",
        group="secrets",
    )
    peer_secret: str = setting("", help="the same, not in a file", secret=True, group="secrets")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.peer_secret_file or self.peer_secret or is_loopback(self.host)):
            where = self.host or "every address"
            raise SettingsError(f"others reach {where}: give --peer-secret-file, too (see docs/security.md)", "host")

    def read_peer_proofs(self) -> PeerProofs:
        """Read the secret, and say so where there is none. Raises SettingsError."""
        secret = read_secret("peer_secret", self.peer_secret, self.peer_secret_file)
        if secret is None:
            log.warning("no --peer-secret-file: listens on %s alone, and takes all who come for peers", self.host)
            return PeerProofs()
        return PeerProofs(
            PeerKeys(secret.derive_all("block protocol")),
            PeerKeys(secret.derive_all("orders")),
            tuple(key.hex() for key in secret.derive_all("debug ports")),
        )


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
