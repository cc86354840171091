"""Loaded by a process under test as it starts: writes down whether torch is imported and which children there are.

PRETENDED_MACHINE is a directory with the /proc, control group and /dev that the process shall see.
"""

import os
import sys
from pathlib import Path

_witness = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
_CHILDREN = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "os.exec"}


def _note(event, arguments):
    if event in _CHILDREN:
        os.write(_witness, f"child: {event} {arguments[0] if arguments else ''}\n".encode())
    elif event == "import" and arguments[0] == "torch":
        os.write(_witness, b"torch\n")


sys.addaudithook(_note)

if "PRETENDED_MACHINE" in os.environ:
    from services import machine

    root = Path(os.environ["PRETENDED_MACHINE"])
    machine._PROC, machine._CGROUP, machine._DEV = root / "proc", root / "cgroup", root / "dev"
