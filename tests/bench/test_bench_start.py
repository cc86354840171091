"""The start bench: what it makes of what the launcher tells, and of the processes that it sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.bench.bench_start import DEMO_MODEL, Phase, Start, measure, phases_of, summary, tandem, tree_cpu_s


def test_a_phase_lasts_until_its_process_is_in_the_next_or_there_is_an_answer() -> None:
    heard = [
        (0.1, '{"process": "tandem", "message": "starting m"}\n'),
        (0.2, '{"process": "router", "message": "importing"}\n'),
        (0.3, '{"process": "decode-0", "message": "loading model", "progress": 0.1}\n'),
        (0.4, '{"process": "decode-0", "message": "loading model", "progress": 0.9}\n'),
        (0.5, "a warning of a library\n"),
        (0.6, '{"process": "decode-0", "message": "one of its logs", "logger": "kvstore"}\n'),
        (0.7, '{"process": "decode-0", "level": "info", "message": "ready"}\n'),
        (2.0, '{"process": "decode-0", "message": "draining"}\n'),
    ]
    assert phases_of(heard, answered_s=1.0) == (
        Phase("decode-0", "loading model", 0.3, 0.7),
        Phase("decode-0", "ready", 0.7, 1.0),
        Phase("router", "importing", 0.2, 1.0),
    )


def test_the_table_has_the_fastest_run_the_median_and_the_least_processor_time() -> None:
    runs = [Start(3.0, 9.0, ()), Start(1.0, 7.5, ()), Start(2.0, 8.0, ())]
    assert summary({"tandem up": runs}).splitlines()[2] == "| tandem up | 1.0 | 2.0 | 7.5 |"


def test_processor_time_is_counted_of_children_and_of_those_that_have_ended() -> None:
    burn = "import os\nwhile sum(os.times()[:2]) < 0.3: pass"
    program = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert tree_cpu_s(process.pid) >= 0.3
        process.kill()


def test_the_demo_model_is_started_asked_and_stopped() -> None:
    start = measure(tandem("demo", Path(DEMO_MODEL)))
    assert {phase.process for phase in start.phases} == {"router", "prefill-0", "decode-0"}
    assert start.cpu_s > 0
