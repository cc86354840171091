"""A program for test_forks.py: says what process it is in, then ends as its first argument says."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import uuid
from pathlib import Path

from services.logs import report_ready


def facts() -> dict[str, object]:
    """What a program can see of how it was started."""
    return {
        "argv": sys.argv[1:],
        "path": sys.path,
        "name": __name__,
        "environ": {name: value for name, value in os.environ.items() if name != "LC_CTYPE"},
        "directory": os.getcwd(),
        "leads_its_session": os.getsid(0) == os.getpgid(0) == os.getpid(),
        "cores": sorted(os.sched_getaffinity(0)),
        "descriptors": sorted(open_files()),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "command": Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").split(b"\0")[1].decode(),
        "parent": os.getppid(),
        "num_threads": len(os.listdir("/proc/self/task")),
        "is_unbuffered": getattr(sys.stdout, "write_through", False),
        "draws": [random.random(), str(uuid.uuid4()), os.urandom(8).hex()],
        "modules": sorted(sys.modules),
    }


def open_files() -> list[tuple[int, str]]:
    """Each descriptor, and what it is: pipes and sockets by their kind."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            found.append((int(number), os.readlink(f"/proc/self/fd/{number}").partition("[")[0]))
    return found


def main() -> None:
    how = sys.argv[1]
    report_ready()
    print(json.dumps(facts()))
    if how == "raise":
        raise ValueError("the fork in the road")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "wait":
        signal.pause()
    if how == "once":  # fails in its first life
        marker = Path(sys.argv[2])
        if marker.exists():
            print("second life")
            signal.pause()
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(how))


if __name__ == "__main__":
    main()
