"""Chooses the transports that a worker offers, and the one that carries a pair of peers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

from kvstore.block import BlockMemory
from kvstore.errors import IncompatiblePeer, TransportError
from kvstore.transport.base import Transport
from kvstore.transport.devices import confine_ucx

logger = logging.getLogger(__name__)

# Lanes on which a one-sided read is done by hardware or by one system call. On tcp NIXL emulates it in software, and
# there a reader's death has aborted the owner's process: two-sided messages are the better choice.
FAST_LANES: Final = frozenset({"rdma", "cuda_ipc", "cma"})
CHOICES: Final = ("auto", "ucxx", "nixl")


def make_transports(choice: str, memory: BlockMemory, name: str, host: str) -> list[Transport]:
    """Return the transports for `--kv-transport`, not started, best first. `name` (role and worker) appears in logs.

    They listen on no other network device than the one that has `host`. `auto` offers all that are installed and leaves
    the choice to each pair of peers. Raises `TransportError` where the chosen one is not installed or no device has the
    host's address, ValueError for an unknown choice.
    """
    if choice not in CHOICES:
        raise ValueError(f"unknown KV transport {choice!r}; choose from {', '.join(CHOICES)}")
    open_devices = confine_ucx(host)
    if open_devices is not None:
        logger.warning(
            "UCX listens on network devices %s: whoever reaches its TCP ports reads and writes all memory of this"
            " process; keep that network to workers and store nodes (docs/security.md)",
            open_devices,
        )
    transports: list[Transport] = []
    # nixl gives the memory itself to peers; ucxx sends it through buffers where that is not to be had.
    if choice == "nixl" or (choice == "auto" and memory.can_be_shown):
        try:
            from kvstore.transport.nixl import NixlTransport

            transports.append(NixlTransport(memory, name))
        except TransportError as error:
            if choice == "nixl":
                raise
            logger.info("nixl is not available, blocks travel over ucxx: %s", error)
    if choice in ("auto", "ucxx"):
        from kvstore.transport.ucxx import UcxxTransport

        transports.append(UcxxTransport(memory, host))
    return transports


def choose(transports: Sequence[Transport], offers: Mapping[str, bytes], peer_name: str) -> tuple[Transport, str]:
    """Return the transport over which we read from a peer, and its lane. `offers`: the peer's descriptors by name.

    A fast lane beats all; then come two-sided transports; a one-sided one without a fast lane is the last resort. Equal
    ones rank as in `transports`. Raises `IncompatiblePeer` where nothing connects the two.
    """
    candidates: list[tuple[int, Transport, str]] = []
    for transport in transports:
        lane = transport.lane_to(offers[transport.name]) if transport.name in offers else None
        if lane is not None:
            rank = 0 if lane in FAST_LANES else 1 if transport.two_sided else 2
            candidates.append((rank, transport, lane))
    if not candidates:
        ours = ", ".join(transport.name for transport in transports) or "none"
        raise IncompatiblePeer(
            f"no KV transport connects us with {peer_name}: ours {ours}, theirs {', '.join(offers) or 'none'}"
        )
    _, transport, lane = min(candidates, key=lambda candidate: candidate[0])
    return transport, lane
