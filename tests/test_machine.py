"""What is read of the machine: memory, processors, instructions."""

from __future__ import annotations

from pathlib import Path

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
