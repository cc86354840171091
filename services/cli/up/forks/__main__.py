"""Runs the fork server: `python -m services.cli.up.forks FD MODULE …`."""

import sys

from services.cli.up.forks.fork_server import main

if __name__ == "__main__":
    main(sys.argv[1:])
