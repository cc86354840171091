"""What is read of the machine: memory, processors, instructions."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from services import machine


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    return tmp_path


def test_memory_is_bounded_by_the_control_group(system: Path) -> None:
    assert machine.available_memory_bytes() == 0
    (system / "meminfo").write_text("MemTotal: 2048 kB\nMemAvailable: 1024 kB\n")
    assert machine.available_memory_bytes() == 1 << 20
    (system / "memory.max").write_text("max\n")
    assert machine.available_memory_bytes() == 1 << 20
    (system / "memory.max").write_text("600000\n")
    (system / "memory.current").write_text("100000\n")
    assert machine.available_memory_bytes() == 500_000


@pytest.mark.parametrize(
    ("text", "quota"), [("max 100000", None), ("150000 100000", 2), ("1000 100000", 1), ("", None)]
)
def test_the_control_group_s_processors(system: Path, text: str, quota: int | None) -> None:
    assert machine.cpu_quota() is None
    (system / "cpu.max").write_text(text)
    assert machine.cpu_quota() == quota


@pytest.mark.parametrize("name", ["flags\t\t", "Features\t"])
def test_the_flags_are_the_first_processor_s(system: Path, name: str) -> None:
    assert machine.processor_flags() == frozenset()
    (system / "cpuinfo").write_text(f"processor\t: 0\n{name}: fpu avx512f\nprocessor\t: 1\n{name}: fpu\n")
    assert machine.processor_flags() == {"fpu", "avx512f"}


def test_this_machine_has_memory() -> None:
    assert machine.available_memory_bytes() > 1 << 20


def test_gpus_are_those_of_the_driver_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_DEV", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    memory = SimpleNamespace(total=24 << 30, free=20 << 30)
    driver = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetMemoryInfo=lambda device: memory,
        nvmlDeviceGetName=lambda device: f"GPU of {device!r}",
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert machine.gpus() == []
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert [gpu.name for gpu in machine.gpus()] == ["0", "1", "10"]
    assert machine.gpus()[1] == machine.Gpu("1", 24 << 30, 20 << 30, "GPU of 1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "10, GPU-5f")
    assert [(gpu.name, gpu.model) for gpu in machine.gpus()] == [("10", "GPU of 10"), ("GPU-5f", "GPU of 'GPU-5f'")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert machine.gpus() == []


def test_a_gpu_whose_driver_says_nothing_is_one_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(machine, "_DEV", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.gpus() == [machine.Gpu("0")]
