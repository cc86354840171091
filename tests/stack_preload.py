"""Imported once by the fork server of `tests.stack`: whatever is slow to import and opens nothing when imported."""

import services.decode.service  # noqa: F401
import services.prefill.service  # noqa: F401
import services.router.process  # noqa: F401
