"""One process of a router that has several: `python -m services.router.processes NUMBER CONTROL LISTENER`.

The two are descriptors that the parent (parent.py) hands down; settings come over the first one, since they hold keys.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from services.router.processes.member import Member


def main(argv: Sequence[str]) -> int:
    """Runs it; returns the exit status."""
    control, listener = (socket.socket(fileno=int(argument)) for argument in argv[1:])
    member = Member.first_word(control, listener)
    if member is None:
        return 0  # who has started it has gone
    from services.router.process import run_router

    return run_router(member.start.config, member)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
