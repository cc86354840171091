"""Chooses the network devices on which UCX listens.

UCX runs whatever active messages come to its TCP ports, and these write and read any memory of the process: it has no
proof of its own. So it listens on the device that has the process's own address, and on no other one.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
from pathlib import Path
from typing import Final

from kvstore.errors import TransportError

_SETTING: Final = "UCX_NET_DEVICES"
_LOOPBACK: Final = "lo"
_INFINIBAND: Final = Path("/sys/class/infiniband")
_NETWORK: Final = Path("/sys/class/net")
# Of Linux's socket filters (linux/filter.h).
_SO_ATTACH_FILTER: Final = 26
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_IPV4_DESTINATION: Final = 0xFFF00000 + 16  # its place in the IP header


def confine_ucx(host: str) -> str | None:
    """Have UCX, in this process, listen on the device that has the address `host`; the user's own UCX_NET_DEVICES wins.

    To be called before UCX starts. Returns the devices on which others reach it, as UCX_NET_DEVICES has them, or None
    where nobody does. RDMA devices stay in use, but for a `host` on loopback, where the fabric's others would reach
    them. Raises `TransportError` where no device has the address.
    """
    if _SETTING not in os.environ:
        devices = _devices_of(host)
        if devices is None:
            return "all"
        os.environ[_SETTING] = ",".join(devices if devices == [_LOOPBACK] else [*devices, *_rdma_ports()])
        if any((_NETWORK / device / "bridge").is_dir() for device in devices):
            os.environ.setdefault("UCX_TCP_BRIDGE_ENABLE", "y")  # else UCX passes over them
    devices_set = os.environ[_SETTING]
    return None if devices_set == _LOOPBACK else devices_set


def narrow(port: int, host: str) -> None:
    """Have the kernel drop what comes for another address than `host` to a port at which this process listens on all.

    For a library that takes no address to listen on. IPv4. Raises `TransportError`.
    """
    addresses = _addresses(host)
    if any(address.is_unspecified for address in addresses):
        return
    allowed = [int(address) for address in addresses if address.version == 4]
    load = struct.pack("HBBI", _LOAD_WORD, 0, 0, _IPV4_DESTINATION)
    # Each comparison jumps, if it holds, over those behind it and over the first return.
    compare = [struct.pack("HBBI", _JUMP_IF_EQUAL, len(allowed) - i, 0, each) for i, each in enumerate(allowed)]
    returns = [struct.pack("HBBI", _RETURN, 0, 0, num_bytes_kept) for num_bytes_kept in (0, 0xFFFFFFFF)]
    program = ctypes.create_string_buffer(b"".join([load, *compare, *returns]))
    # A program is its length, and where it is.
    what = struct.pack("HP", len(compare) + 3, ctypes.addressof(program))
    try:
        with _listening_socket(port) as listening:
            listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, what)
    except OSError as error:
        raise TransportError(f"TCP port {port} cannot be closed to other addresses than {host}: {error}") from error


def _listening_socket(port: int) -> socket.socket:
    """A copy of the one that something in this process listens with."""
    for name in os.listdir("/proc/self/fd"):
        try:
            theirs = socket.socket(fileno=int(name))
        except OSError:
            continue  # no socket, or closed by now
        try:
            is_listening = theirs.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if is_listening and theirs.family == socket.AF_INET and theirs.getsockname()[1] == port:
                return theirs.dup()
        finally:
            theirs.detach()
    raise TransportError(f"nothing of this process listens on TCP port {port}")


def has_rdma() -> bool:
    """Whether this host has an RDMA device that this process can see, and UCX may use."""
    said = os.environ.get(_SETTING, "all")
    names = set(said.removeprefix("^").split(","))
    if "all" in names:
        return bool(_rdma_ports())
    is_named = [port in names or port.partition(":")[0] in names for port in _rdma_ports()]
    return not all(is_named) if said.startswith("^") else any(is_named)


def _rdma_ports() -> list[str]:
    """All ports of RDMA devices, as UCX names them: `mlx5_0:1`."""
    return sorted(f"{path.parents[1].name}:{path.name}" for path in _INFINIBAND.glob("*/ports/*"))


def _devices_of(host: str) -> list[str] | None:
    """The devices that have the addresses of `host`; None: it stands for all."""
    addresses = _addresses(host)
    if any(address.is_unspecified for address in addresses):
        return None
    if all(address.is_loopback for address in addresses):
        return [_LOOPBACK]
    import psutil  # here: a process on loopback has no need of it

    # A second address of eth0 may be called eth0:1.
    devices = {
        name.partition(":")[0]
        for name, theirs in psutil.net_if_addrs().items()
        for one in theirs
        if one.family in (socket.AF_INET, socket.AF_INET6) and ipaddress.ip_address(one.address) in addresses
    }
    if not devices:
        raise TransportError(f"no network device has the address {host}; name those for UCX by {_SETTING}")
    return sorted(devices)


def _addresses(host: str) -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        found = socket.getaddrinfo(host.strip("[]") or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise TransportError(f"no address of {host!r} for UCX to listen on: {error}") from error
    return {ipaddress.ip_address(str(address[0])) for *_, address in found}
