"""Flags of vLLM's for `--engine vllm`: what goes through, from where, and what is refused, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from services.cli.main import main
from services.cli.up.placement import place_workers
from services.cli.up.plan import up_settings
from services.decode.config import DecodeConfig
from services.engine import choice
from services.router.config import RouterConfig
from services.settings import (
    Setting,
    SettingsError,
    block_meaning,
    build_settings,
    collect_settings,
    engine_arguments,
    make_parser,
    settings_of,
    tensor_parallel_size,
)
from services.settings.engine_args import ENGINE_FLAGS, EngineFlag, Fate
from tests.engine_args_page import PAGE, with_tables

UP = up_settings()
ROUTER = list(settings_of(RouterConfig))


def given(*argv: str, items: list[Setting] = UP, environ: Mapping[str, str] | None = None) -> dict[str, object]:
    found = collect_settings(items, argv, environ or {}, make_parser(items))
    return {name: each.value for name, each in found.items()}


def decode_config(*argv: str) -> DecodeConfig:
    items = settings_of(DecodeConfig)
    return build_settings(DecodeConfig, collect_settings(items, ("--model", "m", *argv), {}, make_parser(items)))


def words(row: EngineFlag) -> list[str]:
    return {"switch": [], "value": ["7"], "list": ["1", "2"]}[row.kind]


@pytest.mark.parametrize("row", [row for row in ENGINE_FLAGS if row.goes_through], ids=lambda row: row.names[0])
def test_a_flag_that_goes_through_may_stand_by_itself_or_in_the_string(row: EngineFlag) -> None:
    canonical = [row.names[0], *words(row)]
    for name in row.names:
        config = decode_config("--engine", "vllm", name, *words(row), "--block-size", "16")
        assert engine_arguments(config.engine_args) == canonical
        assert config.block_size == 16
        assert engine_arguments(" ".join([name, *words(row)])) == canonical
    assert bool(block_meaning(" ".join(canonical))) == (row.fate is Fate.MEANING)


@pytest.mark.parametrize("row", [row for row in ENGINE_FLAGS if not row.goes_through], ids=lambda row: row.names[0])
def test_a_flag_that_does_not_is_refused_by_name_with_a_reason(row: EngineFlag) -> None:
    first, off = row.names[0], row.names[0].replace("--", "--no-", 1)
    for name in row.names if "" not in row.same else [off]:
        with pytest.raises(SettingsError, match=f"^({first}|{off}) is (refused: .|a flag of Tandem's)"):
            engine_arguments(" ".join([name, *words(row)]))
    for value in row.same:
        assert engine_arguments(off if value == "no" else f"{first} {value}") == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--kv-transfer-conf {}", r"--kv-transfer-conf is not among .*; did you mean --kv-transfer-config\?"),
        ("--brand-new 1", "--brand-new is not among the flags of vLLM that Tandem knows"),
        ("value", "'value' belongs to no flag"),
        ("--max-loras", "--max-loras takes one value, not 0"),
        ("--max-loras 1 2", "--max-loras takes one value, not 2"),
        ("--enable-lora yes", "--enable-lora takes no value, not 1"),
        ("--no-max-loras", "--no-max-loras is not among"),
        ("--hf-overrides '{", "cannot be read as a shell would"),
        ("--load-format pt", "pickled weights are never loaded"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        engine_arguments(text)


@pytest.mark.parametrize("text", ["--enable-lora", "--max-loras=4 --enable-lora", "--seed 1", "-tp 2", ""])
def test_the_string_is_one_value_whatever_it_looks_like(text: str) -> None:
    for flag in ("--engine-args", "--engine_args"):
        assert given(flag, text, "--engine", "vllm")["engine_args"] == text
    assert given(f"--engine-args={text}", "--engine", "vllm")["engine_args"] == text
    with pytest.raises(SettingsError, match="--engine-args: expected one argument"):
        given("--engine", "vllm", "--engine-args")


@pytest.mark.parametrize(
    "text", ["--attention-backend CPU_MLA", """--speculative-config '{"num_speculative_tokens":3}'"""]
)
def test_what_is_given_in_a_string_keeps_its_underscores(text: str) -> None:
    assert given("--engine", "vllm", "--engine-args", text)["engine_args"] == text
    assert given("--engine", "vllm", f"--engine_args={text}")["engine_args"] == text


def test_spellings_come_to_one() -> None:
    text = """-tp=2 -O3 --enable_lora --no-enable-eplb --compilation-config.mode 3 --hf-overrides '{"a": 1}'"""
    assert engine_arguments(text) == [
        *("--tensor-parallel-size", "2", "--optimization-level", "3", "--enable-lora", "--no-enable-eplb"),
        *("--compilation-config.mode", "3", "--hf-overrides", '{"a": 1}'),
    ]
    assert tensor_parallel_size(text) == 2
    assert tensor_parallel_size("") == 1


def test_both_sides_say_the_same_in_whatever_order() -> None:
    one, other = "--model-impl auto --seed 1 --hf_overrides={}", "--hf-overrides '{}' --model_impl=auto"
    assert block_meaning(one) == block_meaning(other) == ("--hf-overrides {}", "--model-impl auto")


def test_sources_are_joined_in_their_order(tmp_path: Path) -> None:
    file = tmp_path / "up.yaml"
    file.write_text(
        "engine: vllm\nengine-args: --seed 1\nenable-lora: true\nenforce-eager: false\n"
        "speculative-config: {method: ngram}\ncudagraph-capture-sizes: [1, 2]\n"
    )
    found = given("--config", str(file), "--max-loras", "4", "--seed", "2")
    assert engine_arguments(str(found["engine_args"])) == [
        *("--seed", "1", "--enable-lora", "--no-enforce-eager", "--speculative-config", '{"method": "ngram"}'),
        *("--cudagraph-capture-sizes", "1", "2", "--max-loras", "4", "--seed", "2"),
    ]
    assert given(items=ROUTER, environ={"TANDEM_CONFIG": str(file)}) == {}, "what is the workers' is not the router's"
    found = given("--engine", "auto", environ={"TANDEM_ENGINE_ARGS": "--enable-lora"})
    assert found == {"engine": "auto", "engine_args": "--enable-lora"}


def test_flags_of_vllms_server_get_their_answer_with_its_engine_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="--enable-auto-tool-choice is vLLM's, not Tandem's"):
        given("--engine", "vllm", "--enable-auto-tool-choice")
    assert given("--engine", "vllm", "--disable-log-requests") == {"engine": "vllm"}
    assert "changes nothing" in capsys.readouterr().err


def test_a_refusal_names_the_flag_and_the_engine_that_takes_it() -> None:
    for argv, says in (
        (["-tp=2"], "^-tp is vLLM's, not Tandem's: .*; --engine vllm takes it$"),
        (["--moe-backend", "auto"], "^--moe-backend is vLLM's, not Tandem's: --engine vllm takes it$"),
        (["--compilation-config.mode", "3"], "takes it in --engine-args '--compilation-config.mode …'$"),
        (["--mamba-backend", "x"], "^--mamba-backend is vLLM's, not Tandem's: state that is no KV block"),
    ):
        with pytest.raises(SettingsError, match=says):
            given(*argv)
    with pytest.raises(SettingsError, match=r"^flags of vLLM: --pipeline-parallel-size is refused: "):
        decode_config("--engine", "vllm", "-pp", "2")
    with pytest.raises(SettingsError, match=r"^--engine-args: --kv-events-config is refused: "):
        decode_config("--engine", "vllm", "--engine-args", "--kv-events-config {}")


def test_up_says_what_is_missing_before_it_starts_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choice, "vllm_version", lambda: None)
    assert main(["up", "--engine", "vllm"]) == 2
    assert "cannot start: vLLM is to compute (as --engine vllm says), and is not" in capsys.readouterr().err
    assert main(["up", "--engine", "auto", "--enforce-eager"]) == 2
    assert "auto takes the native engine here: the model is one of its own" in capsys.readouterr().err


def test_each_worker_gets_as_many_gpus_as_its_ranks() -> None:
    places = place_workers(3, [], ["0", "1", "2", "3", "4"], gpus_each=2)
    assert [(place.gpu, place.gpu_share) for place in places] == [("0,1", 0.5), ("2,3", 1.0), ("0,1", 0.5)]
    assert place_workers(2, [], [], gpus_each=2)[1].gpu is None
    with pytest.raises(SettingsError, match="--tensor-parallel-size 4: there are 2 GPUs"):
        place_workers(1, [], ["0", "1"], gpus_each=4)


def test_names_are_told_apart() -> None:
    names = [name for row in ENGINE_FLAGS for name in row.names]
    assert len(set(names)) == len(names)


def test_the_page_shows_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run `python -m tests.engine_args_page`"
