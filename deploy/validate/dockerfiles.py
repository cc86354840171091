"""The Dockerfiles: hadolint, and what we promise of every image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deploy.validate.dockerfile import Dockerfile, Instruction, parse
from deploy.validate.environment import CONFIGS, WORKERS, target_of
from deploy.validate.tools import run_tool

# Dockerfiles with a target for each kind of worker; the second is on vLLM's own image.
_OF_WORKERS = ("worker", "worker-vllm")
# Images that must not have torch, whatever else they have.
_WITHOUT_TORCH = ("router", "store")
_KEYWORDS = frozenset(
    {
        "ARG",
        "CMD",
        "COPY",
        "ENTRYPOINT",
        "ENV",
        "EXPOSE",
        "HEALTHCHECK",
        "LABEL",
        "RUN",
        "STOPSIGNAL",
        "USER",
        "WORKDIR",
    }
)


def check_dockerfiles(root: Path) -> Iterator[str]:
    """One line per problem, with the file's name."""
    directory = root / "deploy/docker"
    for name in (*_OF_WORKERS, *(role for role in CONFIGS if role not in WORKERS)):
        if not (directory / f"{name}.Dockerfile").exists():
            yield f"deploy/docker/{name}.Dockerfile: there is none"
    for path in sorted(directory.glob("*.Dockerfile")):
        name = str(path.relative_to(root))
        ok, output, errors = run_tool("hadolint", ["--no-color", name], root)
        if not ok:
            yield from (f"{line}" for line in (output + errors).splitlines() if line)
        try:
            dockerfile = parse(path.read_text(encoding="utf-8"))
            stem = path.name.partition(".")[0]
            roles = WORKERS if stem in _OF_WORKERS else (stem,)
            found = [line for role in roles for line in _promises(root, role, dockerfile)]
            if stem in _OF_WORKERS:
                found += _layers(dockerfile)
            yield from (f"{name}: {complaint}" for complaint in dict.fromkeys(found))
        except (ValueError, KeyError) as error:
            yield f"{name}: {error}"


def _promises(root: Path, role: str, dockerfile: Dockerfile) -> Iterator[str]:
    everything = [item for stage in dockerfile.stages for item in stage.instructions]
    for item in everything:
        if item.keyword not in _KEYWORDS:
            yield f"line {item.line}: {item.keyword} is no instruction"
        if item.keyword == "COPY" and "from" not in item.flags:
            missing = [source for source in item.words[:-1] if not (root / source).exists()]
            if missing:
                yield f"line {item.line}: {', '.join(missing)} is not in the repository"
    image = [item for stage in dockerfile.chain(target_of(role), {}) for item in stage.instructions]
    yield from _process(role, image)
    if role in _WITHOUT_TORCH:
        chain = dockerfile.chain("build", {"VARIANT": "cpu"})
        extras = {word for stage in chain for item in stage.instructions for word in _extras(item)}
        if not extras <= {role}:
            yield f"installs {', '.join(sorted(extras))}: of the extras only {role} comes without torch"


def _layers(dockerfile: Dockerfile) -> Iterator[str]:
    """A machine that has one worker's image has all of them but what they run."""
    for role in WORKERS:
        *below, last = dockerfile.chain(role, {})
        more = [item.keyword for item in last.instructions if item.keyword != "ENTRYPOINT"]
        if more or below != dockerfile.chain(WORKERS[0], {})[:-1]:
            yield f"target {role} does not share all layers: it has {', '.join(more) or 'another base'}"


def _process(role: str, image: list[Instruction]) -> Iterator[str]:
    by_keyword = {item.keyword: item for item in image}
    user = by_keyword.get("USER")
    if user is None or not user.text.isdecimal() or int(user.text) == 0:
        yield "the last USER must be a number other than 0, so that Kubernetes sees that it is not root"
    if "HEALTHCHECK" not in by_keyword:
        yield "has no HEALTHCHECK"
    entry = by_keyword.get("ENTRYPOINT")
    if entry is None or entry.words != ["tandem", role]:
        yield f'ENTRYPOINT must be ["tandem", "{role}"]: signals reach the process itself, and flags can be appended'


def _extras(item: Instruction) -> list[str]:
    if item.keyword != "ENV":
        return []
    return [name for word in item.words if word.startswith("EXTRAS=") for name in word[len("EXTRAS=") :].split(",")]
