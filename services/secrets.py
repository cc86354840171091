"""Reads the secrets of a deployment, and derives a key for each purpose from them.

| secret | who has it | what it is for |
|---|---|---|
| peer secret | all processes | proves them to each other: block protocol, orders, debug ports |
| proof key | prefill and decode workers, never a store node | the tags of KV blocks |
| tenant secret | routers | the salts of tenants' cached blocks |

Each comes from a file (`--peer-secret-file`) or the environment (`TANDEM_PEER_SECRET`). A file holds one secret per
line: the first is used, further ones are taken from others, too, while a deployment changes over.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from services.settings import SettingsError

_MIN_BYTES: Final = 32
_MIN_CHARS: Final = 43
"""Of 32 bytes in base64."""
_MIN_DISTINCT: Final = 10
"""Characters; 32 random bytes in hexadecimal have fewer once in 10^12."""
_MAX_FILE_BYTES: Final = 4096
_HOW_TO_MAKE: Final = "make one with `openssl rand -hex 32`"


@dataclass(frozen=True)
class Secret:
    """A secret, and the older or newer ones that are accepted beside it."""

    _values: tuple[bytes, ...] = field(repr=False)

    def derive(self, purpose: str) -> bytes:
        """Return the key for a purpose, 32 bytes: whoever has it learns neither the secret nor another purpose's."""
        return self.derive_all(purpose)[0]

    def derive_all(self, purpose: str) -> tuple[bytes, ...]:
        """Return the keys for a purpose that others may use; the first is the one to use."""
        return tuple(_hkdf(value, purpose) for value in self._values)


def _hkdf(value: bytes, purpose: str) -> bytes:
    """One block of HKDF-SHA256 (RFC 5869)."""
    extracted = hmac.digest(b"tandem secret 1", value, hashlib.sha256)
    return hmac.digest(extracted, purpose.encode() + b"\x01", hashlib.sha256)


def read_secret(name: str, text: str, path: str) -> Secret | None:
    """Return the secret that a setting (`peer_secret`, say) or its file gives, None where neither does.

    Raises SettingsError, which never shows the secret.
    """
    if text and path:
        raise SettingsError(f"--{_flag(name)}-file {path}, and {_flag(name)} beside it: which?", f"{name}_file")
    if path:
        lines = _read_file(name, path)
        return Secret(tuple(_checked(line, f"--{_flag(name)}-file {path}", f"{name}_file") for line in lines))
    return Secret((_checked(text, _flag(name), name),)) if text else None


def make_secret_file(path: Path) -> None:
    """Make a file with a new secret that its owner alone can read, unless it is there. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists():
        return
    # Whole or not at all: two that start at once must end up with the same secret.
    descriptor, new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # its mode is 0600
    try:
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(_MIN_BYTES) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
    finally:
        os.unlink(new)


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _read_file(name: str, path: str) -> list[str]:
    lines = read_private_file(name, path).split()
    if not lines:
        raise SettingsError(f"--{_flag(name)}-file {path}: it is empty; {_HOW_TO_MAKE}", f"{name}_file")
    return lines


def read_private_file(name: str, path: str, max_bytes: int = _MAX_FILE_BYTES) -> str:
    """Return the text of the file that the setting `NAME_file` gives. Raises SettingsError if others can read it."""
    where, setting = f"--{_flag(name)}-file {path}", f"{name}_file"
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise SettingsError(f"{where}: {error.strerror}", setting) from error
    # A group may read what is root's or another user's, since else we could not: so Kubernetes mounts a secret.
    if status.st_mode & 0o007 or (status.st_mode & 0o070 and status.st_uid == os.geteuid() != 0):
        raise SettingsError(f"{where}: others can read it; chmod 600 {path}", setting)
    if len(content) > max_bytes:
        raise SettingsError(f"{where}: more than {max_bytes} bytes, which is no secret", setting)
    return content.decode("utf-8", "replace")


def _checked(text: str, where: str, setting: str) -> bytes:
    """Refuse what cannot be 32 random bytes: too short, or of too few characters."""
    if not text.isascii() or not text.isprintable():
        raise SettingsError(f"{where}: it must be text, such as hexadecimal; {_HOW_TO_MAKE}", setting)
    is_hex = re.fullmatch(r"[0-9a-fA-F]*", text) is not None
    if len(text) < (2 * _MIN_BYTES if is_hex else _MIN_CHARS) or len(set(text)) < _MIN_DISTINCT:
        raise SettingsError(f"{where}: fewer than {_MIN_BYTES} random bytes; {_HOW_TO_MAKE}", setting)
    return text.encode()
