"""Imported once by the fork server of `tests.stack`: whatever is slow to import and opens nothing when imported."""

import importlib

from services.cli.up.forks import WORKER_MODULES

for name in (*WORKER_MODULES, "services.router.process", "services.store.process"):
    importlib.import_module(name)
