"""Names the tenant behind an API key, and keeps tenants' cached blocks apart.

An entry of `--api-key` is a key, or `tenant:key`: keys of one tenant share its cached prefixes, and a key without a
tenant is one of its own. For a key its hash may stand, `sha256:` and 64 hex digits. Only hashes are kept: keys are long
and random, so a fast hash gives nothing away that could be searched for, and a slow one would cost each request.

A tenant's salt is an HMAC under a secret that routers alone have, so neither what a client sends as its own
`cache_salt`, nor a tenant's name, leads to another tenant's blocks: neither to a hit nor to an answer that comes
sooner. Names only are ever logged.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from services.secrets import Secret

_NAMED_KEY = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}):(.+)", re.DOTALL)
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_SALT_PURPOSE = b"tandem cache salt 1\0"


@dataclass(frozen=True)
class ApiKey:
    """An entry of `--api-key`. `tenant` is empty for a key of its own, `plain` where only the hash was given."""

    tenant: str
    digest: bytes = field(repr=False)
    plain: str = field(repr=False)

    @classmethod
    def parse(cls, entry: str) -> ApiKey:
        """Read an entry."""
        named = None if _HASH.fullmatch(entry) else _NAMED_KEY.fullmatch(entry)
        tenant, key = (named[1], named[2]) if named is not None else ("", entry)
        if (hashed := _HASH.fullmatch(key)) is not None:
            return cls(tenant, bytes.fromhex(hashed[1]), "")
        return cls(tenant, hashlib.sha256(key.encode()).digest(), key)


@dataclass(frozen=True)
class Tenant:
    """One tenant. `name` is fit for a log."""

    name: str
    secret: bytes = field(repr=False)
    """Equal in every router with the same tenant secret, or where there is none, with the same keys."""
    key_id: str = field(default="", compare=False)
    """Which of its keys was shown: the same in every router, and no way to the key."""

    def salt(self, cache_salt: str) -> str:
        """The salt that the workers get, from the one that the client gave (or "")."""
        # A salt from JSON may hold lone surrogates.
        message = _SALT_PURPOSE + cache_salt.encode("utf-8", "surrogatepass")
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()[:32]


def name_of(tenant: Tenant | None) -> str:
    """Empty where no key is needed."""
    return tenant.name if tenant is not None else ""


class Keyring:
    """The accepted keys, by their hashes, and whose they are."""

    def __init__(self, entries: Sequence[str], tenant_secret: Secret | None = None) -> None:
        """Without a `tenant_secret` a tenant's salts follow from its keys: its cache is lost when one changes."""
        keys = [ApiKey.parse(entry) for entry in entries]
        self._tenants = [
            (key.digest, replace(_tenant(index, key, keys, tenant_secret), key_id=_key_id(key)))
            for index, key in enumerate(keys)
        ]
        self.needs_tenant_secret = tenant_secret is None and any(key.tenant for key in keys)

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def find(self, given: bytes) -> Tenant | None:
        """Returns the tenant of a key."""
        # Compare with every key, in constant time: the time must not tell which or how much of it is right.
        digest = hashlib.sha256(given).digest()
        matches = [tenant for known, tenant in self._tenants if hmac.compare_digest(digest, known)]
        return matches[0] if matches else None


def _key_id(key: ApiKey) -> str:
    return hashlib.sha256(b"key id\0" + key.digest).hexdigest()[:16]


def _tenant(index: int, key: ApiKey, keys: Sequence[ApiKey], tenant_secret: Secret | None) -> Tenant:
    # "#" keeps it apart from any name that can be given.
    name = key.tenant or f"#{index + 1}"
    # By name and not by key, so that a tenant keeps its cache when its key is changed.
    identity = b"tenant\0" + key.tenant.encode() if key.tenant else b"key\0" + key.digest
    if tenant_secret is not None:
        return Tenant(name, hmac.digest(tenant_secret.derive("tenants' namespaces"), identity, hashlib.sha256))
    # Who knows the name alone must not know this.
    own = sorted(each.digest for each in keys if each.tenant == key.tenant) if key.tenant else []
    return Tenant(name, hashlib.sha256(identity + b"\0" + b"".join(own)).digest())
