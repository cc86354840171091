"""Imported once by the fork server of `tests.stack`: whatever is slow to import and opens nothing when imported."""

import gc
import importlib

from services.cli.up.forks import WORKER_MODULES
from services.engine.choice import modules_of

for name in (*WORKER_MODULES, *modules_of("native"), "services.router.process", "services.store.process"):
    importlib.import_module(name)
gc.collect()
gc.freeze()  # else each child's first collection would copy all pages
