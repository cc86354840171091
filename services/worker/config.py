"""Declares the settings that both kinds of worker share, spelled as in `vllm serve` where they mean the same."""

from __future__ import annotations

from dataclasses import dataclass

from services.engine.config import EngineConfig
from services.node_settings import NodeSettings
from services.secrets import Secret, read_secret
from services.settings import SettingsError, setting

_WILDCARDS = ("", "0.0.0.0", "::", "[::]")


@dataclass(frozen=True)
class WorkerConfig(NodeSettings, EngineConfig):
    """One worker process: its engine's settings, and whom it serves and where."""

    served_model_name: tuple[str, ...] = setting(
        (), help="name(s) under which clients ask for the model; the default is the value of --model", group="model"
    )
    tokenizer: str = setting(
        "", help="directory or hub name of the tokenizer; the default is the model's", group="model"
    )
    port: int = setting(0, min=0, max=65535, help="gRPC port; 0 chooses a free one", group="network")
    proof_key_file: str = setting(
        "",
        help="file with the secret that KV blocks are tagged with, the same for all workers; no store node has it; mode"
        " 0600",
        group="secrets",
    )
    proof_key: str = setting("", help="the same, not in a file", secret=True, group="secrets")
    warm_up_timeout_s: float = setting(
        300.0,
        above=0,
        help="how long the first steps may take, of made-up tokens, before the worker serves: what is loaded or"
        " compiled once, is then",
        group="model",
    )
    prefix_fetch_timeout_s: float = setting(
        2.5,
        above=0,
        help="how long nothing may come of a prefix that another worker holds; then it is computed",
        group="network",
    )
    prefix_fetch: str = setting(
        "measured",
        help="when a prefix is fetched from another holder: where that was measured to be quicker than computing it,"
        " always, or never",
        choices=("measured", "always", "never"),
        group="KV cache",
    )
    store_write_through: str = setting(
        "all",
        help="which blocks are offered to store nodes, where there are any: all, those that were reused here, or none",
        choices=("all", "reused", "none"),
        group="KV cache",
    )

    def read_proof_key(self) -> Secret | None:
        """Return it, None where there is none. Raises SettingsError."""
        return read_secret("proof_key", self.proof_key, self.proof_key_file)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.served_model_name):
            raise SettingsError("must not be empty", "served_model_name")
        if self.host in _WILDCARDS and not self.advertise_host:
            raise SettingsError(f"{self.host} is no address that others can dial: give --advertise-host too", "host")
