"""A network of its own for each process, so that one can be cut off: namespaces, joined by a bridge.

```text
 chaos, Redis          decode-0            decode-1
 10.99.0.1             10.99.0.2           10.99.0.3      each in a network namespace
    │                      │ eth0              │ eth0
  ══╧══════ bridge ════════╧═══════════════════╧══        cut: that port of the bridge goes down, and nothing is told
```

Needs the right to make namespaces: root's, or that of any user where the system gives it (then we are root in a user
namespace of our own). Everything is gone when the processes are.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from typing import Final

_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_BRIDGE: Final = "tandem0"
_SETUP_TIMEOUT_S: Final = 120.0
HUB: Final = "10.99.0.1"
"""Where this process and Redis are."""


class NoNamespaces(Exception):
    """This user, or this machine, makes no network namespaces."""


def enter() -> None:
    """Put this process, which must have one thread, into a network of its own with a bridge. Raises NoNamespaces."""
    try:
        try:
            _unshare()
        except PermissionError:
            _become_root()
        _ip("link", "set", "lo", "up")
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{HUB}/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoNamespaces(str(error)) from error


def enter_alone() -> None:
    """Run by a process that has just been forked: take a network of its own, and wait until it is joined to ours."""
    _unshare()
    deadline = time.monotonic() + _SETUP_TIMEOUT_S
    while "eth0" not in _routes():
        if time.monotonic() > deadline:
            raise TimeoutError("nobody has joined this process's network to the bridge")
        time.sleep(0.005)


def join(pid: int, index: int) -> None:
    """Join the network of a process that is in `enter_alone` to the bridge, under `address(index)`."""
    deadline = time.monotonic() + _SETUP_TIMEOUT_S
    ours = os.stat("/proc/self/ns/net").st_ino
    while os.stat(f"/proc/{pid}/ns/net").st_ino == ours:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} has taken no network of its own")
        time.sleep(0.005)
    # That of a predecessor, whom the kernel has not yet tidied away.
    subprocess.run(["ip", "link", "del", _port(index)], check=False, capture_output=True)
    # Always the same hardware address: what others remember of the last start holds for this one.
    hardware = ("address", f"02:00:00:00:00:{index + 2:02x}")
    _ip("link", "add", _port(index), "type", "veth", "peer", "name", "eth0", *hardware, "netns", str(pid))
    _ip("link", "set", _port(index), "master", _BRIDGE, "up")
    for command in (["link", "set", "lo", "up"], ["addr", "add", f"{address(index)}/24", "dev", "eth0"]):
        _ip_of(pid, *command)
    _ip_of(pid, "link", "set", "eth0", "up")


def address(index: int) -> str:
    """The address of the process of that number, 0 to 200."""
    return f"10.99.0.{index + 2}"


def cut(index: int) -> None:
    """Let nothing through to or from a process; neither end is told."""
    _ip("link", "set", _port(index), "nomaster")


def heal(index: int) -> None:
    """Let it through again."""
    _ip("link", "set", _port(index), "master", _BRIDGE)


def _port(index: int) -> str:
    return f"tandem-p{index}"


def _routes() -> str:
    with open("/proc/thread-self/net/route", encoding="ascii") as file:
        return file.read()


def _become_root() -> None:
    """In a user namespace of our own, with a network."""
    user, group = os.getuid(), os.getgid()
    _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _unshare(what: int = _CLONE_NEWNET) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(what):
        number = ctypes.get_errno()
        raise OSError(number, f"no network namespace: {os.strerror(number)}")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _ip_of(pid: int, *words: str) -> None:
    subprocess.run(["nsenter", "-t", str(pid), "-n", "ip", *words], check=True, capture_output=True)
