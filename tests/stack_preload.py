"""Imported once by the fork server of `tests.stack`: whatever is slow to import and opens nothing when imported."""

import services.decode.service
import services.prefill.service
import services.router.process
