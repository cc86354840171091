"""Checks that the packages are there, in the versions that Tandem was made for."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

from packaging.requirements import Requirement

import services
from services.cli.doctor.findings import Finding, broken, good, worse
from services.cli.version import installed_version

_MIN_PYTHON = (3, 11)
# No extra, and those that pyproject.toml sums up as `all`: `tandem up` runs every service.
_EXTRAS = ("", "router", "worker", "store", "launcher")


def check_packages() -> list[Finding]:
    """Python, and the versions that the package metadata asks for."""
    findings = []
    if sys.version_info >= _MIN_PYTHON:
        findings.append(good("python", platform.python_version()))
    else:
        findings.append(
            broken("python", platform.python_version(), "install Python 3.11 or later, then `make install`")
        )
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("tandem-serve") or []]
    except importlib.metadata.PackageNotFoundError:
        return [*findings, broken("packages", "tandem itself is not installed", "make install")]
    needed = {item.name: item for item in requirements if _is_needed(item)}
    wrong = [complaint for item in needed.values() if (complaint := _complaint(item))]
    if wrong:
        findings.append(broken("packages", "; ".join(wrong), "make install"))
    else:
        findings.append(good("packages", f"tandem {services.__version__} and all {len(needed)} that it needs"))
    return [*findings, *_check_nixl(requirements)]


def _check_nixl(requirements: list[Requirement]) -> list[Finding]:
    complaints = [complaint for item in requirements if item.name == "nixl-cu13" and (complaint := _complaint(item))]
    if not complaints:
        return []
    return [worse("packages", f"{complaints[0]}: blocks can travel over ucxx only", "pip install 'tandem-serve[nixl]'")]


def _is_needed(requirement: Requirement) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in _EXTRAS)


def _complaint(requirement: Requirement) -> str | None:
    version = installed_version(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} is {version}, not {requirement.specifier}"
    return None
