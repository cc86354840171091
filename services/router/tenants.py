"""Names the tenant behind an API key, and keeps tenants' cached blocks apart.

An entry of `--api-key` is a key, or `tenant:key`: keys of one tenant share its cached prefixes, and a key without a
tenant is one of its own. A tenant's salt is an HMAC, so whatever a client sends as its own `cache_salt`, it never
meets another tenant's blocks, neither as a hit nor as an answer that comes sooner. Names only are ever logged.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_NAMED_KEY = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}):(.+)", re.DOTALL)
_SALT_PURPOSE = b"tandem cache salt 1\0"


@dataclass(frozen=True)
class Tenant:
    """One tenant. `name` is fit for a log."""

    name: str
    secret: bytes = field(repr=False)
    """Equal in every router with the same keys."""

    def salt(self, cache_salt: str) -> str:
        """The salt that the workers get, from the one that the client gave (or "")."""
        # A salt from JSON may hold lone surrogates.
        message = _SALT_PURPOSE + cache_salt.encode("utf-8", "surrogatepass")
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()[:32]


def name_of(tenant: Tenant | None) -> str:
    """Empty where no key is needed."""
    return tenant.name if tenant is not None else ""


class Keyring:
    """The accepted keys and whose they are."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._tenants = [_parse(index, entry) for index, entry in enumerate(entries)]

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def find(self, given: bytes) -> Tenant | None:
        """Returns the tenant of a key."""
        # Compare with every key, in constant time: the time must not tell which or how much of it is right.
        matches = [tenant for key, tenant in self._tenants if hmac.compare_digest(given, key)]
        return matches[0] if matches else None


def split_key(entry: str) -> tuple[str, str]:
    """Tenant and key of an entry of `--api-key`; the tenant is empty where the key is one of its own."""
    match = _NAMED_KEY.fullmatch(entry)
    return (match[1], match[2]) if match is not None else ("", entry)


def _parse(index: int, entry: str) -> tuple[bytes, Tenant]:
    name, key = split_key(entry)
    if not name:
        # "#" keeps it apart from any name that can be given.
        return key.encode(), Tenant(f"#{index + 1}", hashlib.sha256(b"key\0" + key.encode()).digest())
    # By name and not by key, so that a tenant keeps its cache when its key is changed.
    return key.encode(), Tenant(name, hashlib.sha256(b"tenant\0" + name.encode()).digest())
