"""Flags of vLLM's that Tandem lacks: each gets one line, and those that change nothing are taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.main import main
from services.cli.up.plan import up_settings
from services.settings import SettingsError, collect_settings, make_parser
from services.settings.declare import names_of_all_services
from services.settings.vllm_flags import FOREIGN, VLLM_FLAGS, VllmFlag
from tests.vllm_flags_page import PAGE, with_flags


def given(*argv: str) -> dict[str, object]:
    parser = make_parser(up_settings(), prog="tandem up", positional="model")
    return {name: each.value for name, each in collect_settings(up_settings(), argv, {}, parser).items()}


@pytest.mark.parametrize("row", VLLM_FLAGS, ids=lambda row: row.flags[0])
def test_a_flag_that_changes_nothing_is_taken_with_a_note_and_any_other_refused(
    row: VllmFlag, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in row.flags:
        for value in row.same:
            assert given("m", flag, *filter(None, [value]), "--prefill", "2") == {"model": "m", "prefill": 2}
            assert capsys.readouterr().err == f"note: {flag} changes nothing: {row.answer.replace('`', '')}\n"
        value_of_it = [] if FOREIGN[flag] == 0 else ["something else"]
        refused = [flag.replace("--", "--no-", 1)] if row.is_switch else [flag, *value_of_it]
        with pytest.raises(SettingsError, match=f"^{refused[0]} is vLLM's, not Tandem's: "):
            given("m", *refused)


def test_no_flag_of_ours_is_among_them() -> None:
    ours = {f"--{name.replace('_', '-')}" for name in names_of_all_services()}
    flags = [flag for row in VLLM_FLAGS for flag in row.flags]
    assert not ours & set(flags)
    assert len(set(flags)) == len(flags)


def test_the_page_shows_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(VLLM_FLAGS[0].answer) == 1
    assert page == with_flags(page), "run `python -m tests.vllm_flags_page`"


@pytest.mark.parametrize(
    "spelling", ["--tensor_parallel_size=2", "--kv-transfer-config.kv_role=kv_both", "-O3", "-tp=2"]
)
def test_other_spellings_get_the_answer_too(spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "m", spelling])
    said = capsys.readouterr().err
    assert "is vLLM's, not Tandem's: " in said
    assert "did you mean" not in said


def test_a_file_gets_the_answers_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "up.yaml"
    file.write_text("enable-chunked-prefill: true\nload_format: auto\nprefill: 2\n")
    assert given("--config", str(file)) == {"prefill": 2}
    assert len(capsys.readouterr().err.splitlines()) == 2
    for text in ("enable-chunked-prefill: false", "tensor-parallel-size: 2"):
        file.write_text(text)
        with pytest.raises(SettingsError, match="is vLLM's, not Tandem's: "):
            given("--config", str(file))


def test_the_model_may_stand_anywhere_without_a_flag() -> None:
    for argv in (["m"], ["m", "--port", "1"], ["--port", "1", "m"], ["--model", "m", "m"], ["--model", "m"]):
        assert given(*argv)["model"] == "m", argv
    for argv, message in ((["m", "n"], "'n' belongs to no flag"), (["m", "--model", "n"], "which?")):
        with pytest.raises(SettingsError, match=message):
            given(*argv)


def test_serve_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("serve", "up"):
        assert main([command, str(tmp_path)]) == 2
        assert "has no config.json" in capsys.readouterr().err
