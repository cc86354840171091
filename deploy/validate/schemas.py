"""Documents against JSON schemas, with messages that say where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.protocols import Validator

SCHEMAS = Path(__file__).parents[1] / "schemas"


def load_schema(name: str) -> dict[str, Any]:
    """A schema of ours, by its file's name in `deploy/schemas`."""
    loaded: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def violations(document: object, schema: Mapping[str, Any] | Validator) -> Iterator[str]:
    """One line per violation: where, and what."""
    validator = schema if isinstance(schema, Validator) else jsonschema.validators.validator_for(schema)(schema)
    for error in sorted(validator.iter_errors(document), key=lambda error: [str(part) for part in error.absolute_path]):
        cause = jsonschema.exceptions.best_match([error]) or error
        where = ".".join(str(part) for part in cause.absolute_path) or "top level"
        yield f"{where}: {cause.message}"
