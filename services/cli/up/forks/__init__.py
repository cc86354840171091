"""Starts children from a process that has their packages loaded: the launcher's end, the server, what a child begins
with.
"""

from services.cli.up.forks.forks import SHIM, WORKER_MODULES, Forks, ForksLost

__all__ = ["SHIM", "WORKER_MODULES", "Forks", "ForksLost"]
