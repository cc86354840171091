"""Examines the machine: processors, memory, limits, GPUs, and whether the router's port is free."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from services.cli.doctor.findings import Finding, ProbeFailed, broken, good, probe, worse
from services.cli.up import available_cores
from services.engine.cpu_kernels import lacking
from services.machine import available_memory_bytes, processor_flags
from services.startup import CannotListen, claim_port

_MIN_SHM_BYTES = 64 << 20
_MIN_OPEN_FILES = 4096

_TORCH_PROBE = """
import json, torch
gpus = []
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append({"name": properties.name, "bytes": properties.total_memory})
print(json.dumps({"version": torch.__version__, "built_for": torch.version.cuda, "gpus": gpus}))
"""

_KERNEL_PROBE = """
import json
from services.engine.cpu_kernels import AUTOMATIC, lacking
from services.engine.native.kernels.choice import choose_kernels
from services.machine import processor_flags
choice = choose_kernels()
expected = not all(lacking(variant, processor_flags()) for variant in AUTOMATIC)
print(json.dumps({"kernels": choice.library is not None, "reason": choice.reason, "expected": expected}))
"""


def check_processor() -> list[Finding]:
    """Cores, and the instructions that decide how fast bfloat16 is."""
    cores = available_cores()
    num_cores = len(cores) or os.cpu_count() or 1
    findings = [
        good("cores", f"{num_cores} usable")
        if num_cores > 1
        else worse(
            "cores", "1 usable: prefill and decode take turns on it", "use `tandem up --colocated`, or more cores"
        )
    ]
    flags = processor_flags()
    if not flags:
        return findings
    if flags & {"amx_bf16", "avx512_bf16", "bf16"}:
        which = ", ".join(name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags)
        findings.append(good("bfloat16", f"in hardware ({which})"))
    elif not lacking("avx2", flags):
        findings.append(good("bfloat16", "not in hardware: the C kernels compute it in float32, torch would, too"))
    else:
        findings.append(
            worse(
                "bfloat16", "not in hardware: emulated, and slow, on this processor", "give CPU workers --dtype float32"
            )
        )
    return findings


def check_kernels() -> list[Finding]:
    """Tells which kernels compute bfloat16 on this CPU, and why no faster ones: as a worker finds them at start."""
    try:
        said = probe(_KERNEL_PROBE)
    except ProbeFailed as error:
        return [worse("CPU kernels", f"cannot be tried: {error}", "make install")]
    if said["kernels"] or not said["expected"]:
        return [good("CPU kernels", said["reason"])]
    return [worse("CPU kernels", said["reason"], "install gcc 11 or later, then `make kernels`")]


def check_memory(shm: Path = Path("/dev/shm")) -> list[Finding]:
    """Memory to load into, shared memory to exchange blocks through, and the limits that get in the way."""
    findings = [good("memory", f"{available_memory_bytes() / 2**30:.1f} GiB available")]
    if shm.is_dir():
        stat = os.statvfs(shm)
        free = stat.f_bavail * stat.f_frsize
        if free < _MIN_SHM_BYTES:
            findings.append(
                worse(
                    "shared memory", f"{free >> 20} MiB free in {shm}", "docker run --shm-size=1g, or a larger emptyDir"
                )
            )
        else:
            findings.append(good("shared memory", f"{free >> 20} MiB free in {shm}"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        findings.append(worse("open files", f"at most {soft}: few clients at a time", f"ulimit -n {min(hard, 65536)}"))
    else:
        findings.append(good("open files", f"at most {soft}"))
    return findings


def check_torch() -> list[Finding]:
    """Checks that torch loads, and that it sees this machine's GPUs."""
    try:
        said = probe(_TORCH_PROBE)
    except ProbeFailed as error:
        return [broken("torch", f"does not load: {error}", "make install")]
    findings = [good("torch", str(said["version"]))]
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if said["gpus"]:
        names = ", ".join(f"{gpu['name']} ({gpu['bytes'] >> 30} GiB)" for gpu in said["gpus"])
        findings.append(good("GPU", f"{names}, CUDA {said['built_for']}"))
    elif devices and said["built_for"] is None:
        remedy = "make install TORCH_INDEX=https://download.pytorch.org/whl/cu130, after removing .venv"
        findings.append(worse("GPU", f"{len(devices)} there, but this torch is built for CPUs", remedy))
    elif devices:
        detail = f"{len(devices)} there, but torch (CUDA {said['built_for']}) cannot use them"
        findings.append(worse("GPU", detail, "compare the driver's CUDA version in `nvidia-smi`"))
    else:
        findings.append(good("GPU", "none: the workers run on the CPU"))
    return findings


def check_port(host: str, port: int) -> list[Finding]:
    """Checks that the router can listen on its port."""
    try:
        claim_port(host, port)
    except CannotListen as error:
        return [broken("port", str(error), "stop what listens there (`ss -ltnp`), or give the router another --port")]
    return [good("port", f"{host}:{port} is free")]
