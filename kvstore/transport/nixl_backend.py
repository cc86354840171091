"""Makes NIXL's agents, with the settings that UCX needs beneath them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from nixl_cu13._api import nixl_agent

_KEEPALIVE: Final = "KEEPALIVE_INTERVAL"


def make_agent(agent_class: type[nixl_agent], name: str) -> nixl_agent:
    """Return an agent that reads over UCX, and makes progress only when it is called."""
    from nixl_cu13._api import nixl_agent_config

    agent = agent_class(name, nixl_agent_config(enable_prog_thread=False, backends=[]))
    agent.create_backend("UCX", _ucx_settings())
    return agent


def _ucx_settings() -> dict[str, str]:
    """Return what NIXL is to set in its own UCX; the user's settings win.

    Without keep-alives: UCX sends one over each connection every 20 s, and counts a read as ended only when that has
    been taken, which the owner's agent, where nothing else drives it, does ten times a second: one read in 20 s took
    up to 0.1 s longer. Whether a peer lives, our own connection to it says within `peer_timeout_s`.
    """
    if f"UCX_{_KEEPALIVE}" in os.environ:
        return {}
    return {"engine_config": f"{_KEEPALIVE}=inf"}
