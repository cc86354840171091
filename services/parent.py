"""Ends a process that multiprocessing has started when the one that started it is gone. It may have no event loop."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time


def end_with_parent(name: str, grace_s: float) -> None:
    """Have this process, if it was started under a name that begins so, end `grace_s` after who started it.

    What it waits for does not matter; what it does by itself in that time, it does.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not multiprocessing.current_process().name.startswith(name):
        return

    def watch() -> None:
        parent.join()
        time.sleep(grace_s)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
