"""docs/benchmarks.md says what the code does: its flags exist, and its defaults are the Makefile's."""

from __future__ import annotations

import re
from pathlib import Path

from loadtest.plan.options import WORKLOADS
from tests.loadtest.stubs import loadtest

_ROOT = Path(__file__).parents[2]
_PAGE = (_ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
# Of `tandem up`, of workers, of locust, of pip, of `make bench-prefix` and of the benches of the start, of overload, of
# transfers and of handoffs.
_FOREIGN = {
    "--model", "--prefill", "--decode", "--routing-policy", "--host", "--headless", "--master", "--worker",
    "--expect-workers", "--master-host", "--result", "--up-args", "--prefix-fetch", "--max-num-batched-tokens",
    "--quantization", "--runs", "--vllm", "--loads", "--ttft-deadline-s", "--capacity",
    "--speculative-method", "--block-kib", "--blocks", "--lengths", "--parts", "--repetitions", "--workers",
    "--window-s", "--dwell-s", "--outputs", "--ttft", "--tpot", "--helper-threads",
}  # fmt: skip


def test_the_flags_that_the_page_names_exist() -> None:
    helps = "".join(loadtest(command, "--help")[0] for command in ("run", "sweep", "report"))
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", helps))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", _PAGE))
    assert named <= known | _FOREIGN, named - known - _FOREIGN


def test_the_variables_and_defaults_are_those_of_the_makefile() -> None:
    makefile = (_ROOT / "Makefile").read_text(encoding="utf-8")
    declared = dict(re.findall(r"^([A-Z_]+) \?= ?(.*)$", makefile, re.MULTILINE))
    (recipe,) = re.findall(r"^loadtest:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    used = set(re.findall(r"\$\((?:if \$\(|foreach target,\$\()?([A-Z_]+)\)", recipe)) - {"BIN"}
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \|([^|]*)\|", _PAGE, re.MULTILINE))
    assert set(rows) == used
    for name, default in rows.items():
        assert declared[name] == default.strip(" `").replace("the demo model", ""), name


def test_every_workload_has_a_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (?:of|lengths|conversations)", _PAGE, re.MULTILINE)
    assert tuple(rows) == WORKLOADS
