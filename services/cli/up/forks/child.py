"""Becomes another program, bound to its launcher and to its cores: `child.py PARENT_PID CORES PROGRAM …`.

Run by path and without site packages (`python -I -S`), so that it costs milliseconds. A program of its own, and not a
`preexec_fn`: between fork and exec no Python code may run in a process that may have threads.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Collection

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(arguments: list[str]) -> None:
    parent, cores, program = int(arguments[0]), arguments[1], arguments[2:]
    bind(parent, [int(core) for core in cores.split(",") if core])
    os.execvp(program[0], program)


def bind(parent: int, cores: Collection[int]) -> None:
    """Let the kernel kill this process when `parent`, which forked it, dies, however that dies; keep to the cores.

    Both survive exec. Exits where the parent is dead already. Linux; elsewhere nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)
    if cores:
        os.sched_setaffinity(0, cores)


if __name__ == "__main__":
    main(sys.argv[1:])
