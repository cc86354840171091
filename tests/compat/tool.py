"""A third-party tool in a virtual environment of its own: installs it, runs it offline, keeps its output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).parent / "requirements"
BUILD = REPOSITORY / "build" / "compat"

_INSTALL_TIMEOUT_S = 3600.0
_TAIL_CHARACTERS = 3000
# No tool may call home, or look for a model or a data set anywhere but on this machine.
_OFFLINE = {
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(BUILD / "hf"),
    "DO_NOT_TRACK": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "VLLM_NO_USAGE_STATS": "1",
}
_NOT_INHERITED = ("PYTHONPATH", "VIRTUAL_ENV")


class ToolFailed(Exception):
    """A tool could not be installed, or did not end with status 0; with the end of its output."""


@dataclass(frozen=True)
class Tool:
    """Pinned by `requirements/NAME.txt`; its environment is `build/compat/NAME`."""

    name: str
    package: str

    @property
    def version(self) -> str:
        (version,) = re.findall(rf"^{re.escape(self.package)}==(\S+)", self._requirements, re.MULTILINE)
        return str(version)

    def program(self, name: str) -> str:
        """A program of the environment."""
        return str(BUILD / self.name / "bin" / name)

    def install(self, torch_index: str = "") -> None:
        """Does nothing where the environment holds these very requirements already. Raises ToolFailed."""
        stamp = BUILD / self.name / "requirements.txt"
        if stamp.is_file() and stamp.read_text() == self._requirements:
            return
        print(f"{self.name}: installing {self.package} {self.version}", flush=True)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.unlink(missing_ok=True)
        self._execute([sys.executable, "-m", "venv", "--clear", str(BUILD / self.name)], _INSTALL_TIMEOUT_S, {})
        pip = [self.program("python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
        for torch in re.findall(r"^torch==\S+", self._requirements, re.MULTILINE):
            # First and with its own dependencies: which they are depends on the build (CPU, CUDA).
            index = ["--index-url", torch_index] if torch_index else []
            self._execute([*pip, torch, *index], _INSTALL_TIMEOUT_S, {})
        self._execute([*pip, "--no-deps", "--requirement", str(self._file)], _INSTALL_TIMEOUT_S, {})
        stamp.write_text(self._requirements)

    def run(self, command: Sequence[str], timeout_s: float = 900.0, offline: bool = True) -> str:
        """Its standard output. Runs in the repository's root. Raises ToolFailed."""
        return self._execute(command, timeout_s, _OFFLINE if offline else {"DO_NOT_TRACK": "1"})

    def environment(self) -> dict[str, str]:
        """The variables of a program that this process starts by itself: offline, and with none of our packages."""
        return self._inherited() | _OFFLINE

    def scratch(self, name: str) -> Path:
        """An empty place for an output file or directory."""
        path = BUILD / "output" / f"{self.name}-{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            path.unlink()
        return path

    def _execute(self, command: Sequence[str], timeout_s: float, environ: dict[str, str]) -> str:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            try:
                done = subprocess.run(
                    command,
                    cwd=REPOSITORY,
                    env=self._inherited() | environ,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    timeout=timeout_s,
                )
            except subprocess.TimeoutExpired as error:
                raise ToolFailed(f"{self.name} did not end within {timeout_s:g} s; its log is {self._log}") from error
            log.write(done.stdout)
        if done.returncode:
            tail = self._log.read_text(errors="replace")[-_TAIL_CHARACTERS:]
            raise ToolFailed(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
        return done.stdout

    @staticmethod
    def _inherited() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}

    @property
    def _file(self) -> Path:
        return REQUIREMENTS / f"{self.name}.txt"

    @property
    def _requirements(self) -> str:
        return self._file.read_text()

    @property
    def _log(self) -> Path:
        return BUILD / "logs" / f"{self.name}.log"
