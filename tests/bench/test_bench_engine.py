"""The engine's bench runs to its end on any processor, and says what that one cannot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.engine.native.kernels import choice
from services.engine.native.model import linear
from tests.bench import bench_engine, bench_int8_error
from tests.hf_models import write_model


@pytest.fixture(autouse=True)
def num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def old_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without AVX2's companions."""
    monkeypatch.setattr(choice, "processor_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(linear, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(bench_engine, "cpu_has_bfloat16", lambda: False)
    choice.choose_kernels.cache_clear()
    yield
    choice.choose_kernels.cache_clear()


def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """What the bench prints of a tiny model: the cells of each line of its tables."""
    model = write_model(tmp_path / "model", "qwen2_tied", dtype="bfloat16")
    monkeypatch.setattr(bench_engine, "DECODE", [(1, 64)])
    monkeypatch.setattr(bench_engine, "PREFILL", (256,))
    monkeypatch.setattr(sys, "argv", ["bench_engine", "--model", str(model), "--repetitions", "1", "--profile"])
    bench_engine.main()
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_without_kernels_torch_is_measured_alone(
    old_processor: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    decode, _, times, prefill, _, rates = tables(tmp_path, monkeypatch, capsys)
    assert decode[:2] == ["decode step", "torch fp32, ms"]
    assert float(times[1]) >= 0
    assert prefill[:2] == ["prefill", "torch fp32, tok/s"]
    assert float(rates[1].replace(",", "")) > 0
    assert rates[2] == "", "no share of a peak that nobody knows"


def test_with_kernels_they_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if choice.choose_kernels().library is None:
        pytest.skip(f"computes with {choice.choose_kernels().reason}")
    decode, _, _, _, _, rates, *profiles = tables(tmp_path, monkeypatch, capsys)
    assert [name.split(",")[0] for name in decode[1:4]] == ["kernels bf16", "kernels int8", "torch bf16"]
    assert [share[-1] for share in rates[-1].split(" / ")] == ["%", "%"]
    assert {row[0] for row in profiles} >= {"kernels bf16, ms", "kernels int8, ms"}


def test_int8_is_not_measured_without_kernels(old_processor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_int8_error"])
    with pytest.raises(SystemExit, match="int8 needs the CPU kernels, and here computes torch, since the processor"):
        bench_int8_error.main()
