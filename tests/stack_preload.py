"""Imported once by the fork server of `tests.stack`: whatever is slow to import and opens nothing when imported."""

import importlib

for name in ("decode.service", "prefill.service", "worker.process", "router.process", "store.process"):
    importlib.import_module(f"services.{name}")
