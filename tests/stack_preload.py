"""Imported once by the fork server of `tests.stack`: whatever is slow to import and opens nothing when imported."""

import importlib

for name in ("services.decode.service", "services.prefill.service", "services.router.process", "services.store.process"):
    importlib.import_module(name)
