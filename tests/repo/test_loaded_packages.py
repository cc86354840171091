"""Each process loads its own packages and no others; a room of kvstore loads what its smallest user has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from services.cli.embedded_redis import EmbeddedRedis
from services.logs import LAUNCHER_VARIABLE, parse_ready

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "services" / "cli" / "demo_model" / "tandem-demo"
WORKER = ("--model", str(DEMO_MODEL), "--num-gpu-blocks-override", "128", "--num-threads", "1")
TIMEOUT_S = 120.0

# What others load if it is there, and do without: redis, fastapi and torch do, uvicorn chooses among some, a .pth file
# loads one at every start. Where torch computes, and not our kernels, it loads sympy.
OPTIONAL = {
    "cuda-bindings", "cuda-core", "cuda-pathfinder", "grpcio-tools", "h11", "httptools", "nixl-cu13", "nvidia-ml-py",
    "mpmath", "opentelemetry-api", "orjson", "setuptools", "sniffio", "sympy", "wsproto",
}  # fmt: skip
HTTP = {
    "annotated-doc", "annotated-types", "anyio", "click", "fastapi", "prometheus_client", "pydantic",
    "pydantic_core", "starlette", "typing-inspection", "typing_extensions", "uvicorn", "uvloop",
}  # fmt: skip
EVERYBODY = HTTP | {"msgspec", "numpy", "redis"}
BLOCKS = {"libucx-cu13", "libucxx-cu13", "librmm-cu13", "msgpack", "rapids-logger", "ucxx-cu13"}
ORDERS = {"grpcio", "protobuf"}
WORKERS = EVERYBODY | BLOCKS | ORDERS | {"grpcio-health-checking", "safetensors", "torch", "tqdm"}
# The extra that installs each service, as its image does.
EXTRAS = {"router": "router", "store": "store", "prefill": "worker", "decode": "worker"}

SERVICES: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "router": (("--port", "0"), EVERYBODY | ORDERS | {"Jinja2", "MarkupSafe", "tokenizers"}),
    "store": ((), EVERYBODY | BLOCKS),
    "prefill": (WORKER, WORKERS),
    "decode": (WORKER, WORKERS),
}
MESSAGES = {"msgpack", "msgspec", "numpy", "typing_extensions"}
ROOMS = {
    "block": {"numpy"},
    "pool": {"numpy"},
    "protocol": MESSAGES,
    "exchange": MESSAGES,
    "transport": {"numpy"},
    "store": MESSAGES,
    "index": {"msgspec", "numpy", "redis", "typing_extensions"},
    "registry": {"msgspec", "redis", "typing_extensions"},
}


def distributions(log: str) -> set[str]:
    """The packages, other than ours, that a process loaded; `log` is of `python -X importtime`."""
    of = packages_distributions()
    # grpc by itself tries its sisters' empty packages.
    modules = re.findall(r"^import time: .*\| +(?!grpc_\w+$)(\w+)\S*$", log, re.MULTILINE)
    return {name for module in modules for name in of.get(module, ())} - OPTIONAL - set(of["services"])


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `python -X importtime` says of each service until it is ready, all started at once."""
    directory = tmp_path_factory.mktemp("loaded")
    environ = {**os.environ, LAUNCHER_VARIABLE: "1"}
    with EmbeddedRedis.start() as redis:
        processes = {}
        for name, (flags, _) in SERVICES.items():
            command = [sys.executable, "-X", "importtime", "-m", f"services.{name}", "--redis", redis.url, *flags]
            with (directory / name).open("w") as log:
                processes[name] = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
        try:
            return {name: wait_ready(process, directory / name) for name, process in processes.items()}
        finally:
            for process in processes.values():
                process.kill()
                process.wait()


def wait_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while not any(map(parse_ready, (text := log.read_text(errors="replace")).splitlines())):
        assert process.poll() is None, text[-4000:]
        assert time.monotonic() < deadline, text[-4000:]
        time.sleep(0.1)
    return text


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_loads_its_packages_and_nothing_else(logs: dict[str, str], name: str) -> None:
    assert distributions(logs[name]) == SERVICES[name][1]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_loads_nothing_that_its_extra_does_not_install(logs: dict[str, str], name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"][EXTRAS[name]]]
    assert {canonicalize_name(package) for package in distributions(logs[name])} <= installed_by(wanted)


def installed_by(requirements: list[str]) -> set[str]:
    """The packages that these bring, and theirs in turn, on this machine."""
    found: set[str] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if name not in found or requirement.extras:
            found.add(name)
            theirs = [Requirement(text) for text in requires(name) or ()]
            waiting += [(each, which) for each in theirs for which in (requirement.extras or {""})]
    return found


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_worker_on_a_cpu_does_not_load_torchs_compiler(logs: dict[str, str], name: str) -> None:
    """It takes as long to import as all the rest of torch."""
    assert "torch._dynamo" not in logs[name]


def test_the_trial_of_the_kernels_does_not_load_torch() -> None:
    """It is a process of its own, which each worker waits for."""
    assert loaded_by("import services.engine.native.kernels.self_check") == {"numpy"}


def loaded_by(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return distributions(done.stderr)


@pytest.mark.parametrize(
    ("command", "packages"),
    [
        (["--help"], set()),
        (["up", "--help"], set()),
        (["doctor", "--help"], set()),
        (["size", "--model", str(DEMO_MODEL)], {"numpy"}),
    ],
)
def test_the_command_line_loads_next_to_nothing(command: list[str], packages: set[str]) -> None:
    assert loaded_by(f"from services.cli.main import main; main({command})") == packages


def test_the_launcher_and_its_fork_server_load_no_package_by_themselves() -> None:
    """What workers need is loaded by the fork server on order, and by no process that only starts others."""
    modules = ("up.up", "up.stack", "up.forks", "up.forks.fork_server", "embedded_redis")
    assert loaded_by(f"import {', '.join(f'services.cli.{name}' for name in modules)}") == set()


@pytest.mark.parametrize("name", SERVICES)
def test_help_and_a_mistyped_flag_wait_for_nothing(name: str) -> None:
    assert loaded_by(f"import services.{name}.__main__") == set()


@pytest.mark.parametrize(("room", "packages"), ROOMS.items())
def test_a_room_of_kvstore_loads_what_its_smallest_user_has(room: str, packages: set[str]) -> None:
    assert loaded_by(f"import kvstore.{room}") == packages
