"""A service as its Dockerfile makes it, without Docker: the same install lines into a new venv, the same command.

The directories of the image (`/opt/tandem`, `/src`, `/models` …) lie under one of the test's. What the last stage
runs as root (a user, system libraries) is left out, and so is the compiler's installation: this machine's is taken.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deploy.validate.dockerfile import Instruction, Stage, expand, parse

ROOT = Path(__file__).parents[2]
_DIRECTORIES = ("/opt/tandem", "/src", "/models", "/cache", "/data")
# Of the machine that tests: how packages are found here. Nothing else gets in.
_KEPT = ("PIP_", "SSL_", "HTTP_", "HTTPS_", "NO_PROXY", "http_", "https_", "no_proxy")
_INSTALL_TIMEOUT_S = 1200.0


@dataclass
class Image:
    """Where it lies, the environment that its stages set, and what they run."""

    root: Path
    environ: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    health_command: list[str] = field(default_factory=list)

    @property
    def python(self) -> Path:
        return self.root / "opt/tandem/bin/python"

    def start(self, variables: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """`docker run` with `-e` variables; standard output and error go to `log`."""
        with log.open("wb") as output:
            return subprocess.Popen(
                self.command, env=self._environ(variables), cwd=self.root, stdout=output, stderr=output
            )

    def is_healthy(self, variables: Mapping[str, str]) -> bool:
        """Whether the image's health check passes."""
        done = subprocess.run(self.health_command, env=self._environ(variables), capture_output=True, timeout=60)
        return done.returncode == 0

    def _environ(self, variables: Mapping[str, str]) -> dict[str, str]:
        return {**self.environ, **variables}


def build(
    dockerfile: Path, root: Path, arguments: Mapping[str, str], install: bool = True, target: str | None = None
) -> Image:
    """Run the stage `build` (unless its outcome lies there), then read what the target, or the last stage, says of the
    process.
    """
    parsed = parse(dockerfile.read_text(encoding="utf-8"))
    if install:
        _Stages(root, arguments, _machine_environ()).run(parsed.chain("build", arguments))
    last = _Stages(root, arguments, {"PATH": os.defpath})
    last.run(parsed.chain(target, arguments), skip=("RUN",))
    image = Image(root, last.environ)
    for stage in parsed.chain(target, arguments):
        for instruction in stage.instructions:
            if instruction.keyword == "ENTRYPOINT":
                image.command = _resolved(instruction.words, image)
            elif instruction.keyword == "HEALTHCHECK":
                image.health_command = _resolved(instruction.words, image)
    return image


def install_lines(dockerfile: Path, arguments: Mapping[str, str]) -> str:
    """What the stage `build` does, as text: images with the same have the same venv."""
    chain = parse(dockerfile.read_text(encoding="utf-8")).chain("build", arguments)
    return "\n".join(f"{item.keyword} {item.flags} {item.text}" for stage in chain for item in stage.instructions)


class _Stages:
    def __init__(self, root: Path, arguments: Mapping[str, str], environ: dict[str, str]) -> None:
        self._root, self._given = root, arguments
        self._arguments: dict[str, str] = {}
        self._directory = root
        self.environ = environ

    def run(self, chain: list[Stage], skip: tuple[str, ...] = ()) -> None:
        for stage in chain:
            self._arguments = {}
            for instruction in stage.instructions:
                if instruction.keyword not in skip:
                    self._step(instruction)

    def _step(self, instruction: Instruction) -> None:
        if instruction.keyword == "ARG":
            name, _, default = instruction.text.partition("=")
            self._arguments[name] = self._given.get(name, default)
        elif instruction.keyword == "ENV":
            known = {**self._arguments, **self.environ}
            for word in instruction.words:
                name, _, value = word.partition("=")
                self.environ[name] = self._moved(expand(value, known))
        elif instruction.keyword == "WORKDIR":
            self._directory = Path(self._moved(instruction.text))
            self._directory.mkdir(parents=True, exist_ok=True)
        elif instruction.keyword == "COPY" and "from" not in instruction.flags:
            self._copy(instruction.words)
        elif instruction.keyword == "RUN" and not instruction.text.startswith("apt-get "):
            command = ["sh", "-ec", self._moved(instruction.text)]
            environ = {**self._arguments, **self.environ}
            subprocess.run(command, cwd=self._directory, env=environ, check=True, timeout=_INSTALL_TIMEOUT_S)

    def _copy(self, words: list[str]) -> None:
        *sources, target = words
        into = self._directory / self._moved(target)
        for source in sources:
            if (ROOT / source).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, into, ignore=ignore, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / source, into)

    def _moved(self, text: str) -> str:
        for directory in _DIRECTORIES:
            text = text.replace(directory, f"{self._root}{directory}")
        return text


def _resolved(words: list[str], image: Image) -> list[str]:
    """The command with its program's path: that is looked up in the image's PATH."""
    program = shutil.which(words[0], path=image.environ["PATH"])
    assert program is not None, f"{words[0]} is not in the image"
    return [program, *words[1:]]


def _machine_environ() -> dict[str, str]:
    """What the build stage starts with: `python` is the interpreter that runs the tests, without its venv."""
    python = Path(sys.base_prefix) / "bin"
    kept = {name: value for name, value in os.environ.items() if name.startswith(_KEPT)}
    return {**kept, "PATH": f"{python}:{os.defpath}", "HOME": os.environ.get("HOME", "/tmp")}
