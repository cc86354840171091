"""Imported once by the fork server of `tests.stack`: whatever is slow to import and opens nothing."""

import services.engine.engine
import services.settings  # noqa: F401
