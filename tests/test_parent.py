"""A process that multiprocessing has started is gone when the one that started it is, whatever it waits for."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

PARENT = """
    import multiprocessing

    def child(said):
        from services.parent import end_with_parent

        end_with_parent("rank-", grace_s=0.1)
        said.send("watches")
        multiprocessing.get_context("spawn").Event().wait()  # that nobody sets

    if __name__ == "__main__":
        spawn = multiprocessing.get_context("spawn")
        heard, said = spawn.Pipe(duplex=False)
        process = spawn.Process(target=child, args=(said,), name="rank-0")
        process.start()
        assert heard.recv() == "watches"
        print(process.pid, flush=True)
        process.join()
"""


def test_it_ends_after_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environ)
    assert parent.stdout is not None
    with parent.stdout:
        child = os.pidfd_open(int(parent.stdout.readline()))
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        ended, _, _ = select.select([child], [], [], 60)
        assert ended
    finally:
        os.close(child)
