"""Examines how blocks could travel: what ucxx and NIXL load, UCX's lanes, and the kernel's permissions."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path

from services.cli.doctor.findings import Finding, ProbeFailed, broken, good, probe, worse

# Not ucxx.init(): that starts threads, and the context alone knows the resources.
_UCXX_PROBE = """
import json, ucxx
from ucxx._lib.libucxx import UCXContext
print(json.dumps({"version": ".".join(map(str, ucxx.get_ucx_version())), "info": UCXContext({}).info}))
"""

_NIXL_PROBE = """
import json
from nixl_cu13._api import nixl_agent, nixl_agent_config
agent = nixl_agent("tandem-doctor", nixl_agent_config(enable_prog_thread=False))
print(json.dumps({"plugins": list(agent.get_plugin_list()), "memory": list(agent.get_plugin_mem_types("UCX"))}))
"""

# Cross-memory attach between two processes of ours, as UCX's cma does it: one lets itself be read, the other reads.
_CMA_PROBE = """
import ctypes, json, os
class Piece(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("length", ctypes.c_size_t)]
libc = ctypes.CDLL(None, use_errno=True)
source, target = ctypes.create_string_buffer(b"tandem"), ctypes.create_string_buffer(6)
said, done = os.pipe(), os.pipe()
owner = os.getpid()
libc.prctl(0x59616D61, ctypes.c_long(-1), 0, 0, 0)  # PR_SET_PTRACER to any, as UCX does
child = os.fork()
if child == 0:
    here, there = Piece(ctypes.addressof(target), 6), Piece(ctypes.addressof(source), 6)
    got = libc.process_vm_readv(owner, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    os._exit(0 if got == 6 and target.raw == b"tandem" else min(ctypes.get_errno(), 254) or 255)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps({"errno": status, "why": os.strerror(status) if 0 < status < 255 else ""}))
"""


def check_ucxx() -> list[Finding]:
    """Checks that UCX loads; lists its transports and devices."""
    try:
        said = probe(_UCXX_PROBE)
    except ProbeFailed as error:
        return [broken("ucxx", f"does not load: {error}", "make install")]
    resources = ucx_resources(str(said["info"]))
    if not any(name.startswith("tcp/") for name in resources):
        return [broken("ucxx", f"UCX {said['version']} offers no tcp: {', '.join(resources)}", "unset UCX_TLS")]
    return [good("ucxx", f"UCX {said['version']}: {', '.join(resources)}"), *check_ucx_devices(os.environ)]


def check_ucx_devices(environ: Mapping[str, str]) -> list[Finding]:
    """Where UCX is told to listen, if it is: without that, workers on loopback listen on loopback alone."""
    devices = environ.get("UCX_NET_DEVICES", "lo")
    if devices == "lo":
        return []
    detail = f"UCX_NET_DEVICES={devices}: whoever reaches UCX's TCP ports there reads and writes workers' memory"
    return [worse("UCX's ports", detail, "unset UCX_NET_DEVICES, or keep these networks to workers (docs/security.md)")]


def ucx_resources(info: str) -> list[str]:
    """The transports with their devices, such as `tcp/eth0`, that UCX lists in its context's description."""
    lines = (line for line in info.splitlines() if "resource" in line and " -- " in line)
    return [line.rsplit(" -- ", 1)[1].strip() for line in lines]


def check_nixl() -> list[Finding]:
    """Checks that NIXL loads with its UCX backend."""
    try:
        said = probe(_NIXL_PROBE)
    except ProbeFailed as error:
        detail = f"does not load: {error}; blocks travel over ucxx"
        return [worse("nixl", detail, "pip install 'tandem-serve[nixl]'")]
    kinds = {"DRAM_SEG": "host", "VRAM_SEG": "GPU"}
    memory = ", ".join(kinds[kind] for kind in said["memory"] if kind in kinds)
    return [good("nixl", f"UCX backend for {memory} memory")]


def check_cross_memory_attach(yama: Path = Path("/proc/sys/kernel/yama/ptrace_scope")) -> list[Finding]:
    """Checks that one worker may read another's memory here: the fastest way between two on a CPU."""
    try:
        said = probe(_CMA_PROBE)
    except ProbeFailed as error:
        said = {"errno": 1, "why": str(error)}
    if said["errno"] == 0:
        return [good("cma", "a process may read another's memory: one copy between workers on this machine")]
    scope = yama.read_text(encoding="utf-8").strip() if yama.is_file() else "absent"
    return [
        worse(
            "cma",
            f"process_vm_readv is refused ({said['why']}; ptrace_scope {scope}): workers here talk over tcp",
            "docker run --cap-add SYS_PTRACE, or sysctl kernel.yama.ptrace_scope=1 or lower",
        )
    ]


def check_rdma(infiniband: Path = Path("/sys/class/infiniband")) -> list[Finding]:
    """RDMA devices, and whether memory may be pinned for them."""
    devices = sorted(path.name for path in infiniband.glob("*")) if infiniband.is_dir() else []
    if not devices:
        return [good("RDMA", "no devices: blocks travel over shared memory and tcp")]
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        detail = f"{', '.join(devices)}, but only {soft >> 10} KiB may be locked: the KV pool cannot be registered"
        can_raise = hard == resource.RLIM_INFINITY
        remedy = "ulimit -l unlimited" if can_raise else "docker run --ulimit memlock=-1, or limits.conf"
        return [broken("RDMA", detail, remedy)]
    return [good("RDMA", ", ".join(devices))]
