"""Makes all checks of `tandem doctor` side by side: most of them wait for a probe that imports something large."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from kvstore.threads import OsThreads, Threads
from services.cli.config import DoctorConfig
from services.cli.doctor.engine import check_engine
from services.cli.doctor.findings import Finding, ProbeTimedOut, worse
from services.cli.doctor.machine import check_kernels, check_memory, check_port, check_processor, check_torch
from services.cli.doctor.model import check_model
from services.cli.doctor.packages import check_packages
from services.cli.doctor.registry import check_redis
from services.cli.doctor.transports import check_cross_memory_attach, check_nixl, check_rdma, check_ucxx

_Check = Callable[[], list[Finding]]
_TIMEOUT_S = 90.0  # longer than a probe's
_LOOK_AGAIN = "run it again when the machine is quieter; if it stays, whatever it looks at hangs"


def checks_of(config: DoctorConfig) -> dict[str, _Check]:
    """The checks by what they are about."""
    return {
        "packages": check_packages,
        "processor": check_processor,
        "memory": check_memory,
        "port": lambda: check_port(config.host, config.port),
        "redis": lambda: check_redis(config.redis),
        "engine": lambda: check_engine(config),
        "model": lambda: check_model(config),
        "CPU kernels": check_kernels,
        "cma": check_cross_memory_attach,
        "RDMA": check_rdma,
        "nixl": check_nixl,
        "ucxx": check_ucxx,
        "torch": check_torch,
    }


async def examine(checks: dict[str, _Check], timeout_s: float = _TIMEOUT_S) -> AsyncIterator[Finding]:
    """Make all checks at once; the findings come in the order of the checks, each as soon as it can."""
    threads = OsThreads()
    running = [asyncio.create_task(_made(threads, *each, timeout_s)) for each in checks.items()]
    for findings in running:
        for finding in await findings:
            yield finding


async def _made(threads: Threads, subject: str, check: _Check, timeout_s: float) -> list[Finding]:
    try:
        async with asyncio.timeout(timeout_s):
            return await threads.run(check)
    except ProbeTimedOut as error:
        return [worse(subject, str(error), _LOOK_AGAIN)]
    except TimeoutError:
        return [worse(subject, f"no answer within {timeout_s:g} s", _LOOK_AGAIN)]
    except Exception as error:  # of the examination, not of what it examines: the rest is still worth knowing
        return [worse(subject, f"could not be examined: {error!r}", "please report this")]
