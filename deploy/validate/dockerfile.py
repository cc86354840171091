"""A Dockerfile as instructions and stages: as much of its grammar as ours use."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True)
class Instruction:
    """One instruction, continuation lines joined. `flags` are its `--name=value` words, `text` is the rest."""

    line: int
    keyword: str
    flags: Mapping[str, str]
    text: str

    @property
    def words(self) -> list[str]:
        """The arguments; those of the exec form are strings of a JSON list. Raises ValueError."""
        text = self.text.removeprefix("CMD").strip() if self.keyword == "HEALTHCHECK" else self.text
        return [str(word) for word in json.loads(text)] if text.startswith("[") else shlex.split(text)


@dataclass
class Stage:
    """`FROM base AS name`, and what follows; `base` may have variables."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Dockerfile:
    """`arguments` are the defaults of the ARGs before the first FROM: they choose stages."""

    arguments: dict[str, str]
    stages: list[Stage]

    def chain(self, name: str | None, arguments: Mapping[str, str]) -> list[Stage]:
        """The stages that a stage (None: the last) is built on, the lowest first; the images below it are left out."""
        by_name = {stage.name: stage for stage in self.stages}
        stage = by_name[name] if name else self.stages[-1]
        chain = [stage]
        while (base := expand(stage.base, {**self.arguments, **arguments})) in by_name:
            stage = by_name[base]
            chain.insert(0, stage)
        return chain


def parse(text: str) -> Dockerfile:
    """Raises ValueError, which names the line."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction in _instructions(text):
        if instruction.keyword == "FROM":
            words = instruction.text.split()
            if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS"):
                raise ValueError(f"line {instruction.line}: expected FROM image [AS name], got {instruction.text!r}")
            stages.append(Stage(words[2] if len(words) == 3 else "", words[0]))
        elif stages:
            stages[-1].instructions.append(instruction)
        elif instruction.keyword == "ARG":
            name, _, value = instruction.text.partition("=")
            arguments[name] = value
        else:
            raise ValueError(f"line {instruction.line}: {instruction.keyword} before the first FROM")
    if not stages:
        raise ValueError("no FROM")
    return Dockerfile(arguments, stages)


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` replaced; an unknown one is empty, as Docker has it."""
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], ""), text)


def _instructions(text: str) -> Iterator[Instruction]:
    pending, started = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        started = started if pending else number
        pending += line.rstrip().removesuffix("\\")
        if line.rstrip().endswith("\\"):
            continue
        keyword, _, rest = pending.strip().partition(" ")
        flags = {}
        while match := re.match(r"\s*--([a-z-]+)=(\S+)\s*", rest):
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        yield Instruction(started, keyword.upper(), flags, rest.strip())
        pending = ""
