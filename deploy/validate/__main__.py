"""`python -m deploy.validate [ROOT]`: is everything in deploy/ what the tools that read it take? Needs no network."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deploy.validate.compose import check_compose
from deploy.validate.dockerfiles import check_dockerfiles
from deploy.validate.manifests import check_manifests
from deploy.validate.monitoring import check_monitoring
from deploy.validate.tools import ToolMissing

CHECKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "Dockerfiles": check_dockerfiles,
    "compose": check_compose,
    "kustomize": check_manifests,
    "rules and dashboards": check_monitoring,
}


def problems(root: Path) -> Iterator[tuple[str, str]]:
    """What is wrong: the kind, and a line that names the file. Raises ToolMissing."""
    for kind, check in CHECKS.items():
        yield from ((kind, line) for line in check(root))


def main(argv: Sequence[str]) -> int:
    """Prints what is wrong; returns the exit status."""
    root = Path(argv[0]) if argv else Path(__file__).parents[2]
    num_problems = 0
    for kind, check in CHECKS.items():
        try:
            found = list(check(root.resolve()))
        except ToolMissing as error:
            found = [str(error)]
        print(f"{kind}: {f'{len(found)} problems' if found else 'good'}")
        for line in found:
            print(f"  {line}")
        num_problems += len(found)
    return 1 if num_problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
