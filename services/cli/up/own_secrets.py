"""Makes the secrets of a stack whose operator gives none: files of his own, beside the store's directory if it has one.

There blocks outlive the stack, and their tags with them; else the files are gone when it ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from services.cli.config import UpConfig
from services.router.config import RouterConfig
from services.secrets import make_secret_file
from services.settings import Given, SettingsError
from services.store.config import StoreConfig
from services.worker.config import WorkerConfig

_NAMES = ("peer_secret", "proof_key", "tenant_secret")


def own_secrets(
    config: UpConfig, store: StoreConfig, given: Mapping[str, Given], cleanup: ExitStack
) -> dict[str, Given]:
    """The settings that name the files of those secrets that are not given. The files are yet to be made."""
    missing = [name for name in _NAMES if name not in given and f"{name}_file" not in given]
    if config.stores and store.store_disk_dir:
        directory = Path(store.store_disk_dir).absolute() / "secrets"
    else:
        try:
            directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="tandem-")))
        except OSError as error:
            raise SettingsError(f"there is no place for the stack's secrets: {error}") from error
    return {f"{name}_file": Given(str(directory / name.replace("_", "-")), "tandem up") for name in missing}


def make_secrets(own: Mapping[str, Given]) -> None:
    """Make the files that are not there. Raises SettingsError."""
    for name, given in own.items():
        try:
            make_secret_file(Path(str(given.value)))
        except OSError as error:
            raise SettingsError(f"cannot make {given.value}: {error.strerror}", name) from error


def check_secrets(router: RouterConfig, worker: WorkerConfig) -> None:
    """Read all of them, before a process fails to. Raises SettingsError."""
    router.read_peer_proofs()
    router.read_tenant_secret()
    worker.read_proof_key()
