"""What must hold of the repository itself: generated stubs, targets that the README names, no paths of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUBS = ("worker_pb2.py", "worker_pb2.pyi", "worker_pb2_grpc.py")
# Home and work directories of whoever built it.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(root|home/\w+|Users/\w+|work/(main|shared))(/|\b)")


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_committed_stubs_are_what_the_generator_gives(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", "proto/tandem/v1/worker.proto", *outputs]
    subprocess.run(command, cwd=ROOT, check=True, timeout=150)
    for name in STUBS:
        generated = (tmp_path / "tandem/v1" / name).read_bytes()
        assert generated == (ROOT / "proto/tandem/v1" / name).read_bytes(), f"{name} is stale: run `make proto`"


def test_no_file_mentions_a_path_of_the_machine_it_was_written_on() -> None:
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" in data or path == Path(__file__):
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
            if MACHINE_PATHS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert found == []


def test_make_targets_that_the_documents_name_exist() -> None:
    targets = makefile_targets()
    documents = [path for path in tracked_files() if path.suffix == ".md"]
    assert documents
    for path in documents:
        text = path.read_text(encoding="utf-8")
        code = re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL)
        named = {name for span in code for name in re.findall(r"\bmake ([a-z][a-z-]*)", span)}
        assert named <= targets, f"{path.relative_to(ROOT)} names {sorted(named - targets)}"


def test_every_public_target_has_a_line_of_help() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert set(phony.split()) == makefile_targets()
    for target in phony.split():
        assert re.search(rf"^{target}:.*## \S", text, re.MULTILINE), target


def test_every_dependency_is_pinned_by_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins), "exact, without build suffix"
    pinned = {normalized(pin.partition("==")[0]) for pin in pins}
    needed = {re.split(r"[\[<>=~! ]", item)[0] for item in [*project["dependencies"], *extras["nixl"], *extras["dev"]]}
    assert {normalized(name) for name in needed} <= pinned


def test_torch_is_pinned_alike_everywhere() -> None:
    dockerfiles = [
        str(path)
        for path in (ROOT / "deploy/docker").glob("*.Dockerfile")
        if path.stem not in ("router", "worker-vllm")
    ]
    for name in ("pyproject.toml", "constraints.txt", "deploy/install.sh", *dockerfiles):
        assert set(re.findall(r"torch==([0-9.]+[0-9])", (ROOT / name).read_text(encoding="utf-8"))) == {"2.13.0"}, name


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


MAX_ADAPTER_LINES = 1510
IMPORTS_VLLM = re.compile(
    r"""^\s*(import|from)\s+vllm\b|(import_module|__import__|run_module)\(\s*f?["']vllm\b|["']vllm\.\w|-m["',\s]+vllm\b""",
    re.MULTILINE,
)


def test_nothing_but_its_adapter_imports_vllm() -> None:
    """By name, too, which `lint-imports` does not see. What knows it only in words is not meant."""
    product = [path.relative_to(ROOT) for path in tracked_files() if path.suffix in (".py", ".sh", ".toml")]
    found = [
        str(path)
        for path in product
        if path.parts[0] in ("kvstore", "services", "loadtest", "deploy", "proto")
        and path.parts[:3] != ("services", "engine", "vllm")
        and IMPORTS_VLLM.search((ROOT / path).read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import vllm",
        "    from vllm.v1.engine.core import EngineCore",
        "import vllm.envs as envs",
        "importlib.import_module('vllm')",
        'import_module(f"vllm.{name}")',
        "__import__('vllm')",
        '"vllm.v1.core.sched.scheduler.Scheduler"',
        'runpy.run_module("vllm")',
        '[sys.executable, "-m", "vllm.entrypoints.cli.main"]',
        "python -m vllm.entrypoints.openai.api_server",
    ],
)
def test_each_of_these_would_be_found(line: str) -> None:
    assert IMPORTS_VLLM.search(line)


@pytest.mark.parametrize(
    "line", ["from services.engine.vllm import VllmEngine", "engine = 'vllm'", "import vllm_flags"]
)
def test_what_only_names_it_is_not_found(line: str) -> None:
    assert not IMPORTS_VLLM.search(line)


def test_vllms_adapter_is_small() -> None:
    """What is every engine's belongs to `services/engine`."""
    adapter = (ROOT / "services/engine/vllm").rglob("*.py")
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in adapter) <= MAX_ADAPTER_LINES


def test_the_versions_with_vllm_are_ours_but_where_it_asks_for_less() -> None:
    ours, with_vllm = (
        dict(re.findall(r"^([^#\s=]+)==(\S+)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
        for name in ("constraints.txt", "constraints-vllm.txt")
    )
    assert ours.keys() <= with_vllm.keys()
    older = {name for name, version in ours.items() if with_vllm[name] != version}
    assert older == {"fastapi", "numpy", "setuptools", "transformers"}
    assert not {"torchvision", "torchaudio", "torchcodec"} & with_vllm.keys(), "PyPI's builds of them fail on CPUs"


def test_extra_and_image_have_the_vllm_that_the_engine_takes() -> None:
    from services.engine.choice import VLLM_VERSIONS, check_vllm

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["vllm"] == [f"vllm{VLLM_VERSIONS}"]
    (pinned,) = re.findall(r"^vllm==(\S+)$", (ROOT / "constraints-vllm.txt").read_text(encoding="utf-8"), re.MULTILINE)
    check_vllm(pinned, "cuda", "")
    image = (ROOT / "deploy/docker/worker-vllm.Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"^FROM vllm/vllm-openai:v(\S+)", image, re.MULTILINE)) == {pinned}


def test_threads_come_from_their_seam() -> None:
    """Imports are ruled by `lint-imports`; these come with asyncio."""
    shells = {ROOT / each for each in ("kvstore/threads.py", "kvstore/transport/nixl_agent.py", "services/parent.py")}
    sources = [path for path in tracked_files() if path.suffix == ".py" and path not in shells]
    product = [path for path in sources if path.relative_to(ROOT).parts[0] in ("kvstore", "services")]
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in product
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and _starts_a_thread(call)
    ]
    assert found == []


def _starts_a_thread(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    in_default_pool = name == "run_in_executor" and isinstance(call.args[0], ast.Constant)
    return in_default_pool or name in ("to_thread", "Thread", "ThreadPoolExecutor")
