"""Which kernels a machine gets, and what it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.engine.cpu_kernels import AUTOMATIC, REQUIRED_FLAGS
from services.engine.native.build import variants
from services.engine.native.kernels.choice import choose
from services.engine.native.kernels.library import AttentionCall, KernelError, KernelLibrary
from services.engine.native.kernels.self_check import check
from tests.kernels.conftest import Libraries

AMX, AVX512, AVX2 = (REQUIRED_FLAGS[variant] | REQUIRED_FLAGS["avx2"] for variant in ("amx", "avx512", "avx2"))
NEON = REQUIRED_FLAGS["neon"]
ALL = {"amx", "avx512", "avx2"}


def choice_of(
    wanted: str, flags: frozenset[str], built: set[str], faulty: set[str], library: KernelLibrary
) -> tuple[bool, str]:
    def load(variant: str, path: Path) -> KernelLibrary:
        assert path == Path(variant)
        if variant in faulty:
            raise KernelError(f"{variant} gives a wrong product")
        return library

    chosen = choose(wanted, flags, lambda variant: Path(variant) if variant in built else None, load)
    return chosen.library is library, chosen.reason


@pytest.mark.parametrize(
    ("flags", "built", "faulty", "expected"),
    [
        (AMX, ALL, set(), (True, "amx kernels")),
        (AMX, ALL, {"amx"}, (True, "avx512 kernels; amx gives a wrong product")),
        (AVX512, ALL, set(), (True, "avx512 kernels")),
        (AVX2, ALL, set(), (True, "avx2 kernels")),
        (AVX512, ALL, {"avx512"}, (True, "avx2 kernels; avx512 gives a wrong product")),
        (
            AVX2,
            set(),
            set(),
            (False, "torch, since avx2 kernels are not built (a C compiler was missing when tandem was installed)"),
        ),
        (AVX2, ALL, {"avx2"}, (False, "torch, since avx2 gives a wrong product")),
        (
            AMX,
            ALL,
            ALL,
            (
                False,
                "torch, since amx gives a wrong product; avx512 gives a wrong product; avx2 gives a wrong product",
            ),
        ),
        (
            frozenset({"avx2"}),
            ALL,
            set(),
            (False, "torch, since the processor has neither AMX, nor AVX-512 with bfloat16, nor AVX2 with FMA"),
        ),
        (
            NEON,
            {"neon"},
            set(),
            (False, "torch, since those for ARM have not been measured (--cpu-kernels neon takes them)"),
        ),
    ],
    ids=[
        "amx",
        "amx is wrong",
        "no amx",
        "avx2",
        "avx512 is wrong",
        "not built",
        "avx2 is wrong",
        "all wrong",
        "old processor",
        "arm",
    ],
)
def test_the_fastest_library_that_is_built_and_right_is_chosen(
    libraries: Libraries, flags: frozenset[str], built: set[str], faulty: set[str], expected: tuple[bool, str]
) -> None:
    assert choice_of("auto", flags, built, faulty, libraries("portable")) == expected


@pytest.mark.parametrize(
    ("wanted", "flags", "built", "faulty", "expected"),
    [
        ("avx2", AMX, ALL, set(), (True, "avx2 kernels")),
        ("neon", NEON, {"neon"}, set(), (True, "neon kernels")),
        ("avx2", AMX, ALL, {"avx2"}, (False, "torch, since avx2 gives a wrong product")),
        (
            "avx512",
            AVX512 - {"avx512_bf16", "avx512_vnni"},
            ALL,
            set(),
            (False, "torch, since avx512 kernels need avx512_bf16, avx512_vnni of the processor"),
        ),
        (
            "avx512",
            AMX,
            {"amx", "avx2"},
            set(),
            (False, "torch, since avx512 kernels are not built (a C compiler was missing when tandem was installed)"),
        ),
    ],
    ids=["not the fastest", "arm", "wrong", "not of this processor", "not built"],
)
def test_kernels_by_name_are_these_or_none(
    libraries: Libraries,
    wanted: str,
    flags: frozenset[str],
    built: set[str],
    faulty: set[str],
    expected: tuple[bool, str],
) -> None:
    assert choice_of(wanted, flags, built, faulty, libraries("portable")) == expected


def test_each_architecture_has_libraries_of_its_own() -> None:
    built = {machine: variants(machine) for machine in ("x86_64", "aarch64", "riscv64")}
    assert built["riscv64"] == ("portable",)
    assert {*built["x86_64"], *built["aarch64"]} == {"portable", *REQUIRED_FLAGS}
    assert not {*AUTOMATIC, "portable"} - {*built["x86_64"]}


def test_every_library_that_runs_here_passes_its_check(library: KernelLibrary) -> None:
    check(library)


def test_a_wrong_sum_is_found(libraries: Libraries, monkeypatch: pytest.MonkeyPatch) -> None:
    library = libraries("portable")
    linear = KernelLibrary.linear

    def off_by_a_row(self: KernelLibrary, *arguments: Any, **settings: Any) -> None:
        weights, x, x_stride, num_rows, *rest = arguments
        linear(self, weights, x, x_stride, num_rows - 1, *rest, **settings)

    monkeypatch.setattr(KernelLibrary, "linear", off_by_a_row)
    with pytest.raises(KernelError, match="portable gives a wrong product of 1 rows and a bfloat16 matrix"):
        check(library)


def test_wrong_attention_is_found(libraries: Libraries, monkeypatch: pytest.MonkeyPatch) -> None:
    library = libraries("portable")
    attention = KernelLibrary.attention

    def forgets_the_window(self: KernelLibrary, call: AttentionCall, *arguments: Any, **settings: Any) -> None:
        call.window = 0
        attention(self, call, *arguments, **settings)

    monkeypatch.setattr(KernelLibrary, "attention", forgets_the_window)
    with pytest.raises(KernelError, match=r"portable is off by [0-9.]+ in attention with window 40"):
        check(library)


def test_a_library_of_other_sources_is_refused(libraries: Libraries, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(libraries("portable")._library._name)
    monkeypatch.setattr("services.engine.native.kernels.library.source_digest", lambda sources: 1)
    with pytest.raises(KernelError, match="other sources than are here"):
        KernelLibrary(path)


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.so"
    path.write_bytes(b"")
    with pytest.raises(KernelError, match=r"empty\.so does not load"):
        KernelLibrary(path)
