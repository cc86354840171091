"""Has ucxx's progress thread wait for UCX's events, and look for itself now and then.

ucxx wakes it each millisecond, 1.9 % of a core where nothing moves. UCX tells it of everything that comes, and ucxx of
everything that is posted; should one of these be missed, as ucxx's authors seem to fear, it costs `_LOOK_MS`.
"""

from __future__ import annotations

import asyncio
import weakref
from types import ModuleType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ucxx._lib.libucxx import UCXWorker

_LOOK_MS: Final = 50


def mend(ucxx: ModuleType) -> None:
    """Have contexts that ucxx makes from now on progress so in the mode `thread`."""
    from ucxx._lib_async import application_context, continuous_ucx_progress

    class Patient(continuous_ucx_progress.ProgressTask):  # type: ignore[misc]
        """`ThreadMode` with another time-out."""

        def __init__(self, worker: UCXWorker, event_loop: asyncio.AbstractEventLoop, polling_mode: bool) -> None:
            super().__init__(worker, event_loop)
            worker.set_progress_thread_start_callback(continuous_ucx_progress._create_context)
            worker.start_progress_thread(polling_mode=polling_mode, epoll_timeout=_LOOK_MS)
            weakref.finalize(self, worker.stop_progress_thread)

    assert hasattr(application_context, "ThreadMode"), f"ucxx {ucxx.__version__} progresses in another way"
    application_context.ThreadMode = Patient
