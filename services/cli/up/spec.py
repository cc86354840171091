"""Describes what `tandem up` runs: one program to keep running, and the whole stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.startup import address_of


@dataclass(frozen=True)
class ChildSpec:
    """A program to keep running.

    `cores` are the processors that it may use, none for all of them; `grace_s` is the time from SIGTERM to SIGKILL.
    `is_forked`: `argv` is a worker's `python -m MODULE …`, which starts sooner in a process that has torch loaded.
    """

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    cores: tuple[int, ...] = ()
    grace_s: float = 10.0
    is_forked: bool = False


@dataclass(frozen=True)
class Stack:
    """The processes of one `tandem up`, and where its router answers."""

    router: ChildSpec
    workers: tuple[ChildSpec, ...]
    host: str
    port: int
    has_tls: bool
    served_model_name: str
    stores: tuple[ChildSpec, ...] = ()
    api_key: str = field(default="", repr=False)
    """One that the router takes; empty where it asks for none."""
    worker_prefix: str = ""
    """Stands before a process's name in the registry."""
    first_prompt_words: int = 1
    """Length of a prompt that takes the way of most, in tokens at least."""

    @property
    def reachable_host(self) -> str:
        """An address under which this machine reaches the router, which may listen on all of them."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)

    @property
    def url(self) -> str:
        return f"{'https' if self.has_tls else 'http'}://{address_of(self.reachable_host, self.port)}"
