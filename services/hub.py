"""Fetches a model's files from the Hugging Face hub, and says in one line why they are not to be had."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


class NotOnHub(Exception):
    """The hub does not give what was asked for; the message says why, and what to do about it."""


def looks_like_path(model: str) -> bool:
    """Whether a model that is no directory was meant to be one: hub names are NAME or OWNER/NAME."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or os.path.exists(model)


def fetch(name: str, revision: str, patterns: Sequence[str]) -> Path:
    """Return the directory with those files of a repository: from the cache, else downloaded. Raises `NotOnHub`."""
    import huggingface_hub  # slow to import, and local directories do without
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Of the HTTP library that the hub's client is made with, whichever that is.
    http_error: type[BaseException] = HfHubHTTPError.__mro__[1]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise NotOnHub(f"{name} is neither a directory here nor a name that the hub could have; correct it") from error
    except (OSError, ValueError, http_error) as error:
        raise NotOnHub(_explain(name, revision, error, huggingface_hub.get_token() is not None)) from error


def _explain(name: str, revision: str, error: BaseException, has_token: bool) -> str:
    """What the hub's error means to whoever gave the name."""
    from huggingface_hub import errors

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if isinstance(error, errors.GatedRepoError):
        remedy = f"ask for access at {endpoint}/{name}" + ("" if has_token else ", and give your token as HF_TOKEN")
        return f"{name} is gated, and {'this token may not read it' if has_token else 'there is no token'}; {remedy}"
    if isinstance(error, errors.RepositoryNotFoundError):
        seen = "this token sees no such repository" if has_token else "there is no such repository, or it is private"
        remedy = "correct the name" + ("" if has_token else ", or give a token as HF_TOKEN")
        return f"{name} is no directory here, and on the hub {seen}; {remedy}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r} on the hub; correct --revision"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
            return f"{name} is neither a directory here nor in the hub's cache, and HF_HUB_OFFLINE is set; unset it"
        why = str(error.__cause__ or error).splitlines()[0]
        return (
            f"{name} is neither a directory here nor in the hub's cache, and {endpoint} cannot be reached ({why}); "
            f"give a directory, or mend the network"
        )
    why = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{name} cannot be had from {endpoint}: {why}; see disk, proxy and HF_HOME, and try again"
