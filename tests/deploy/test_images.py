"""Every service started by the very command of its Dockerfile, from a new venv made by the same install lines."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from deploy.validate.environment import dockerfile_of_image, target_of
from tests.deploy.image import ROOT, Image, build, install_lines
from tests.peers import PEER_SECRET
from tests.ports import free_port

# What a user says who has no access to torch's own index; and the demo model, in the image.
ARGUMENTS = {"VARIANT": "cpu", "TORCH_INDEX": "", "MODEL": "demo"}
ROLES = ("router", "prefill", "decode", "elastic", "store")
WAIT_S = 180.0

PROMPT = "The code of amber is 4711. The code of cedar is 0952. What is the code of amber?"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Image]:
    """One image per role; those with the same install lines share the venv."""
    found: dict[str, Image] = {}
    roots: dict[str, Path] = {}
    for role in ROLES:
        dockerfile = dockerfile_of_image(ROOT, f"tandem-{role}:cpu")
        lines = install_lines(dockerfile, ARGUMENTS)
        is_new = lines not in roots
        if is_new:
            roots[lines] = tmp_path_factory.mktemp(role)
        found[role] = build(dockerfile, roots[lines], ARGUMENTS, is_new, target_of(role))
    return found


def files(root: Path) -> dict[str, int]:
    """Path to time of change, of everything that the image has."""
    return {str(path): path.stat().st_mtime_ns for path in sorted((root / "opt").rglob("*")) if not path.is_symlink()}


@pytest.fixture
def variables(images: dict[str, Image], redis_url: str) -> dict[str, dict[str, str]]:
    """By role, what `docker run -e` would say: what deploy/compose says, and free ports instead of the image's."""
    model = str(images["decode"].root / "models/tandem-demo")
    router = {"TANDEM_REDIS": redis_url, "TANDEM_PEER_SECRET": PEER_SECRET}
    store = router | {"TANDEM_ADVERTISE_HOST": "localhost"}
    worker = store | {"TANDEM_MODEL": model, "TANDEM_SERVED_MODEL_NAME": "tandem-demo", "TANDEM_NUM_THREADS": "1"}
    by_role = {"router": router, "prefill": worker, "decode": worker, "elastic": worker, "store": store}
    ports = {"router": ("PORT",), "store": ("KV_PORT", "HTTP_PORT")}
    return {
        role: given | {f"TANDEM_{name}": str(free_port()) for name in ports.get(role, ("PORT", "KV_PORT", "HTTP_PORT"))}
        for role, given in by_role.items()
    }


@pytest.fixture
def services(
    images: dict[str, Image], variables: dict[str, dict[str, str]], tmp_path: Path
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """All of them, running and healthy."""
    with ExitStack() as stack:
        processes = {}
        for role in ROLES:
            process = images[role].start(variables[role], tmp_path / f"{role}.log")
            stack.callback(end, process)
            processes[role] = process
        for role, process in processes.items():
            wait_for(lambda role=role: images[role].is_healthy(variables[role]), role, process, tmp_path)
        yield processes


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait(20)


def wait_for(condition: Callable[[], bool], role: str, process: subprocess.Popen[bytes], logs: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        log = (logs / f"{role}.log").read_text(errors="replace")
        assert process.poll() is None, f"{role} ended with {process.returncode}:\n{log[-4000:]}"
        assert time.monotonic() < deadline, f"{role} is not healthy after {WAIT_S:g} s:\n{log[-4000:]}"
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_service_starts_by_its_dockerfile_serves_and_stops(
    images: dict[str, Image],
    variables: dict[str, dict[str, str]],
    services: dict[str, subprocess.Popen[bytes]],
    tmp_path: Path,
) -> None:
    before = {role: files(images[role].root) for role in ROLES}
    url = f"http://127.0.0.1:{variables['router']['TANDEM_PORT']}"
    wait_for(lambda: httpx.get(f"{url}/ready").status_code == 200, "router", services["router"], tmp_path)
    store_url = f"http://127.0.0.1:{variables['store']['TANDEM_HTTP_PORT']}"
    wait_for(lambda: httpx.get(f"{store_url}/ready").status_code == 200, "store", services["store"], tmp_path)
    request = {"model": "tandem-demo", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=request, timeout=120)
    assert answer.status_code == 200, answer.text
    assert "4711" in answer.json()["choices"][0]["text"]

    for role in ROLES:
        services[role].send_signal(signal.SIGTERM)
        assert services[role].wait(60) == 0, (tmp_path / f"{role}.log").read_text()[-4000:]
    # The root file system may be read-only: nothing in the image has changed.
    assert {role: files(images[role].root) for role in ROLES} == before


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("role", ["router", "store"])
def test_images_without_an_engine_have_no_torch(images: dict[str, Image], role: str) -> None:
    listed = subprocess.run(
        [images[role].python, "-m", "pip", "list", "--format", "freeze"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PATH": os.defpath},
    )
    names = {line.partition("==")[0] for line in listed.stdout.splitlines()}
    assert "tandem-serve" in names
    assert not names & {"torch", "transformers", "safetensors"}
