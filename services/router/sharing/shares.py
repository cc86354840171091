"""Reads the tenants' shares: weight, priority and limits of each, from a file in YAML or JSON.

    default: {weight: 1, requests_per_minute: 600}
    tenants:
      acme: {weight: 4, tokens_per_minute: 1000000, max_concurrent: 64, limits_for: tenant}
      batch: {priority: 10}

A tenant has what the file says of it, else what `default` says; 0 is no limit. Whoever is not named is `default`, each
for itself. Weights and priorities are a tenant's; limits are each key's, unless `limits_for` is `tenant`. Keys without
a tenant's name are tenants called "#1", "#2" … in the order in which they were given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from services.settings import SettingsError

_SETTING = "tenants_file"


class Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one tenant gets. 0 is no limit."""

    weight: float = 1.0
    """Of its part of what there is, while others want some, too."""
    priority: int = 0
    """Smaller is sooner; before all weights."""
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    """Of prompts and answers."""
    max_concurrent: int = 0
    """HTTP requests at a time."""
    limits_for: Literal["key", "tenant"] = "key"
    """Whom the limits hold for: each of the tenant's keys by itself, or all of them together."""

    @property
    def is_limited(self) -> bool:
        return bool(self.requests_per_minute or self.tokens_per_minute or self.max_concurrent)

    def part(self, num_routers: int) -> Share:
        """One router's part of the limits, where each keeps its own: at least 1 of what is limited."""
        limits = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
        parts = {name: -(-getattr(self, name) // num_routers) for name in limits}
        return msgspec.structs.replace(self, **parts)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    default: dict[str, object] = {}
    tenants: dict[str, dict[str, object]] = {}


@dataclass(frozen=True)
class Shares:
    """Everybody's share."""

    default: Share = field(default_factory=Share)
    tenants: Mapping[str, Share] = field(default_factory=dict)

    def of(self, tenant: str) -> Share:
        """Return the share of a tenant, by its name; "" where there are no keys."""
        return self.tenants.get(tenant, self.default)

    def of_client(self, client: str) -> Share:
        """Return the share of a client as the edge names it: `tenant NAME`, or an address."""
        kind, _, name = client.partition(" ")
        return self.of(name) if kind == "tenant" else self.default


def read_shares(path: str) -> Shares:
    """Read the file; "" gives everybody the same, without limits. Raises `SettingsError`, naming what is wrong."""
    if not path:
        return Shares()
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_bytes())
        file = msgspec.convert(values if values is not None else {}, _File)
        default = _share(file.default, {}, "default")
        named = {str(name): _share(own, file.default, name) for name, own in file.tenants.items()}
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}", _SETTING) from error
    return Shares(default, named)


def _share(own: Mapping[str, object], default: Mapping[str, object], name: str) -> Share:
    try:
        share = msgspec.convert({**default, **own}, Share)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {error}") from error
    if not 0 < share.weight <= 1e6:
        raise ValueError(f"{name}: weight must be positive and at most 1e6, got {share.weight:g}")
    limits = (share.requests_per_minute, share.tokens_per_minute, share.max_concurrent)
    if min(limits) < 0 or not -(2**31) <= share.priority < 2**31:
        raise ValueError(f"{name}: limits must not be negative, and a priority is a 32-bit integer")
    return share
