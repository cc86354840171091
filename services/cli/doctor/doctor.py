"""`tandem doctor`: examines this machine, prints the findings and their remedies."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from services.cli.config import DoctorConfig
from services.cli.doctor.findings import Finding, Verdict
from services.settings import load_settings

_COLORS = {Verdict.GOOD: "\x1b[32m", Verdict.WORSE: "\x1b[33m", Verdict.BROKEN: "\x1b[31m"}


def main(argv: Sequence[str]) -> int:
    """Prints the findings; returns 1 if one of them stops Tandem from serving, else 0."""
    description = (
        "Examines packages, processor, memory, GPUs, Redis, UCX transports, the router's port and the model. "
        "✓ is well, ! serves with less or did not answer in time, ✗ does not serve. Exit status 1 if there is a ✗."
    )
    config = load_settings(DoctorConfig, argv, prog="tandem doctor", description=description)
    import asyncio  # here and not above: --help must not pay for it

    is_colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def show(finding: Finding) -> None:
        if not config.json:
            print(format_finding(finding, is_colored), flush=True)

    findings = asyncio.run(_examine(config, show))
    serves = all(finding.verdict is not Verdict.BROKEN for finding in findings)
    if config.json:
        print(report(findings, serves))
    else:
        print("\nReady to serve." if serves else "\nNot ready to serve: see the lines marked ✗.")
    return 0 if serves else 1


async def _examine(config: DoctorConfig, show: Callable[[Finding], None]) -> list[Finding]:
    from services.cli.doctor.examination import checks_of, examine

    findings = []
    async for finding in examine(checks_of(config)):
        findings.append(finding)
        show(finding)
    return findings


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
