"""Finds the lanes between two processes (same host, readable memory) by looking and trying."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import msgspec

from kvstore.transport.devices import has_rdma


class HostFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A process's word to others on where it runs."""

    boot_id: str
    pid_namespace: int
    pid: int
    has_rdma: bool
    probe_address: int
    """Of `probe_value` in the process's memory: who can read it there can read all of the process's memory."""
    probe_value: bytes


def host_facts(probe: ctypes.Array[ctypes.c_char]) -> HostFacts:
    """Return the facts of this process. `probe` is a buffer with random content that stays alive and unchanged."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pid_namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        boot_id, pid_namespace = "", 0  # an unusual kernel or sandbox: no lane that needs the same host
    return HostFacts(boot_id, pid_namespace, os.getpid(), has_rdma(), ctypes.addressof(probe), probe.raw)


def on_same_host(ours: HostFacts, theirs: HostFacts) -> bool:
    """Whether both processes run under the same kernel, in the same pid namespace."""
    return bool(ours.boot_id) and (ours.boot_id, ours.pid_namespace) == (theirs.boot_id, theirs.pid_namespace)


def can_read_memory(theirs: HostFacts) -> bool:
    """Whether the kernel lets us read the peer's memory (cma). Tries it: containers and ptrace rules may forbid it."""
    size = len(theirs.probe_value)
    if not 1 <= size <= 64:
        return False
    local = ctypes.create_string_buffer(size)
    here = _IoVector(ctypes.addressof(local), size)
    there = _IoVector(theirs.probe_address, size)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        process_vm_readv = libc.process_vm_readv
    except AttributeError:
        return False
    process_vm_readv.restype = ctypes.c_ssize_t
    num_read = process_vm_readv(
        ctypes.c_int(theirs.pid),
        ctypes.byref(here),
        ctypes.c_ulong(1),
        ctypes.byref(there),
        ctypes.c_ulong(1),
        ctypes.c_ulong(0),
    )
    return bool(num_read == size and local.raw == theirs.probe_value)


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))
