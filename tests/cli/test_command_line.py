"""The `tandem` command: help that imports nothing heavy, unknown commands, and the request that `up` prints."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.config import DEMO_MODEL, UpConfig
from services.cli.main import main
from services.cli.up import choose_model
from services.cli.up.console import PlainDisplay
from services.cli.up.example import curl_line, example_request
from services.cli.up.spec import ChildSpec, Stack
from services.cli.up.up import announce_stack
from services.startup import CannotListen, claim_port

HEAVY = ("torch", "numpy", "fastapi", "uvicorn", "grpc", "google.protobuf", "redis", "ucxx", "rich", "yaml", "asyncio")


@pytest.mark.parametrize(
    "argv",
    [["--help"], [], *([command, "--help"] for command in ("up", "router", "prefill", "decode", "doctor", "size"))],
    ids=lambda argv: " ".join(argv),
)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys\n"
        "from services.cli.main import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as error: status = error.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], status, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True, timeout=150)
    assert done.stderr.strip().splitlines()[-1] == "[] 0"
    assert "usage: tandem" in done.stdout


def test_up_help_names_the_settings_of_all_processes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["up", "--help"])
    text = capsys.readouterr().out
    for flag in ("--prefill", "--colocated", "--redis", "--kv-transport", "--max-num-seqs", "--api-key", "--no-pin"):
        assert flag in text


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upp"]) == 2
    assert "'upp' is no command; there are up, serve, router" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "prog"), [("up", "tandem up"), ("serve", "tandem serve")])
def test_errors_and_help_have_the_name_that_was_called(
    name: str, prog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--no-such-flag"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"{prog}: error: ")
    assert lines[-1] == f"Try '{prog} --help'."
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert f"usage: {prog}" in capsys.readouterr().out


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("argv", [["up", "--help"], ["size"], ["--version"]], ids=" ".join)
def test_a_reader_that_leaves_early_ends_a_command_quietly(argv: list[str], unbuffered: str) -> None:
    gone, ours = os.pipe()
    os.close(gone)
    command = [sys.executable, "-m", "services.cli.main", *argv]
    environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    try:
        done = subprocess.run(command, stdout=ours, stderr=subprocess.PIPE, text=True, timeout=120, env=environ)
    finally:
        os.close(ours)
    assert done.stderr == ""
    assert done.returncode in (0, 128 + signal.SIGPIPE), "argparse itself passes over it"


def test_version_lists_what_it_runs_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["tandem", "python", "torch"]
    with pytest.raises(SystemExit, match="2"):
        main(["version", "--all"])


def test_up_refuses_a_misspelled_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["up", "--prefil", "2"])
    assert "--prefil is not a setting; did you mean --prefill?" in capsys.readouterr().err


def test_a_taken_port_is_noticed_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["up", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_an_unreachable_redis_is_noticed_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"redis://:hunter2@127.0.0.1:{claim_port('127.0.0.1', 0)}/0"
    assert main(["up", "--port", "0", "--redis", url]) == 2
    message = capsys.readouterr().err
    assert "Connection refused" in message
    assert "hunter2" not in message


def test_port_0_becomes_a_free_port() -> None:
    assert claim_port("127.0.0.1", 0) > 0
    with pytest.raises(CannotListen, match="give another --host or --port"):
        claim_port("192.0.2.1", 8000)


def test_a_model_may_be_a_directory_or_a_hub_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert choose_model(str(tmp_path)) == (str(tmp_path), str(tmp_path))
    assert choose_model("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")


def test_the_example_suits_the_model(tmp_path: Path) -> None:
    path, body = example_request("tandem-demo", "services/cli/demo_model/tandem-demo")
    assert (path, body["temperature"]) == ("/v1/completions", 0)
    assert "What is the code of" in str(body["prompt"])
    assert example_request("m", str(tmp_path))[0] == "/v1/completions"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert example_request("m", str(tmp_path))[0] == "/v1/chat/completions"


def test_the_example_is_a_shell_command_that_holds_no_key() -> None:
    line = curl_line("http://127.0.0.1:8000", "/v1/completions", {"model": "m", "prompt": "it's"}, needs_key=True)
    words = shlex.split(line)
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/completions"]
    assert json.loads(words[words.index("-d") + 1]) == {"model": "m", "prompt": "it's"}
    assert "Authorization: Bearer $TANDEM_API_KEY" in words


def test_a_command_whose_streams_are_closed_ends_as_others_do() -> None:
    command = ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", sys.executable, "-m", "services.cli.main"]
    assert subprocess.run([*command, "up", "--model", "/no/such/model", "--port", "0"]).returncode == 2
    assert subprocess.run([*command, "version"]).returncode == 0


def test_a_stack_that_cannot_say_on_standard_output_where_it_serves_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = io.StringIO()
    stack = Stack(ChildSpec("router", (), {}), (), "127.0.0.1", 8000, False, "tandem-demo")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        announce_stack(stack, UpConfig(), str(DEMO_MODEL), PlainDisplay([], said))
        monkeypatch.undo()
    assert said.getvalue() == (
        "tandem | Tandem serves tandem-demo at http://127.0.0.1:8000/v1;"
        " standard output takes nothing: No space left on device\n"
    )
