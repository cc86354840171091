"""`tandem doctor`: examines this machine, prints the findings and their remedies."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from services.cli.config import DoctorConfig
from services.cli.doctor.findings import Finding, Verdict
from services.settings import load_settings

_COLORS = {Verdict.GOOD: "\x1b[32m", Verdict.WORSE: "\x1b[33m", Verdict.BROKEN: "\x1b[31m"}


def main(argv: Sequence[str]) -> int:
    """Prints the findings; returns 1 if one of them stops Tandem from serving, else 0."""
    description = (
        "Examines packages, processor, memory, GPUs, Redis, UCX transports, the router's port and the model. "
        "✓ is well, ! serves with less, ✗ does not serve. Exit status 1 if there is a ✗."
    )
    config = load_settings(DoctorConfig, argv, prog="tandem doctor", description=description)
    findings = []
    for finding in examine(config):
        findings.append(finding)
        if not config.json:
            print(format_finding(finding, colored=sys.stdout.isatty() and "NO_COLOR" not in os.environ), flush=True)
    serves = all(finding.verdict is not Verdict.BROKEN for finding in findings)
    if config.json:
        print(report(findings, serves))
    else:
        print("\nReady to serve." if serves else "\nNot ready to serve: see the lines marked ✗.")
    return 0 if serves else 1


def examine(config: DoctorConfig) -> Iterable[Finding]:
    """Lists all findings, the quick ones first."""
    # Here and not above: --help must not pay for them.
    from services.cli.doctor.machine import check_kernels, check_memory, check_port, check_processor, check_torch
    from services.cli.doctor.model import check_model
    from services.cli.doctor.packages import check_packages
    from services.cli.doctor.registry import check_redis
    from services.cli.doctor.transports import check_transports

    yield from check_packages()
    yield from check_processor()
    yield from check_kernels()
    yield from check_memory()
    yield from check_port(config.host, config.port)
    yield from check_redis(config.redis)
    yield from check_model(config.model)
    yield from check_transports()
    yield from check_torch()


def format_finding(finding: Finding, colored: bool) -> str:
    """`✗ port: …` and, below it, the remedy."""
    mark = finding.verdict.value
    if colored:
        mark = f"{_COLORS[finding.verdict]}{mark}\x1b[0m"
    line = f"{mark} {finding.subject}: {finding.detail}"
    return f"{line}\n    → {finding.remedy}" if finding.remedy else line


def report(findings: Sequence[Finding], serves: bool) -> str:
    """The findings as one JSON object."""
    entries = [asdict(finding) | {"verdict": finding.verdict.name.lower()} for finding in findings]
    return json.dumps({"serves": serves, "findings": entries}, ensure_ascii=False, indent=2)
