"""Settings: where values come from, which wins, what is refused and how the refusal reads."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.cli.config import DoctorConfig, SizeConfig, UpConfig
from services.decode.config import DecodeConfig
from services.prefill.config import PrefillConfig
from services.router.config import RouterConfig
from services.settings import (
    Settings,
    SettingsError,
    argv_of,
    load_settings,
    secret_environment,
    setting,
    settings_of,
)
from services.settings.declare import Range, names_of_all_services
from services.settings.load import resolve_settings
from services.settings.values import parse_quantity
from services.store.config import StoreConfig
from services.worker.config import WorkerConfig


@dataclass(frozen=True)
class Example(Settings):
    port: int = setting(8000, min=0, max=65535, help="port of the HTTP API")
    host: str = setting("127.0.0.1", help="address")
    api_key: tuple[str, ...] = setting((), help="accepted keys", secret=True)
    ratio: float = setting(0.5, above=0, max=1, help="share")
    kv_cache_memory_bytes: int | None = setting(None, help="size of the pool")
    caching: bool = setting(True, help="reuse blocks")
    dtype: str = setting("auto", help="numbers", choices=("auto", "float32"))
    num_shards: int = setting(1, help="shards", flags=("--tensor-parallel-size", "-tp"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_shards > 1 and not self.host:
            raise SettingsError("num_shards: several need a host")


def resolve(*argv: str, environ: dict[str, str] | None = None) -> Example:
    return resolve_settings(Example, argv, environ or {})


def refusal(*argv: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        resolve(*argv, environ=environ)
    return str(caught.value)


def write(path: Path, text: str) -> str:
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("declared", "allowed", "refused", "words"),
    [
        ({"min": 0}, [0, 5], [-1, math.inf, math.nan], "not be negative"),
        ({"min": 2}, [2, 10**9], [1], "be at least 2"),
        ({"above": 0}, [1e-9], [0, math.inf, math.nan], "be positive"),
        ({"above": 1}, [1.5], [1.0], "be above 1"),
        ({"above": 0, "max": 1}, [0.1, 1], [0, 1.1, math.nan], "be above 0 and at most 1"),
        ({"min": 1, "max": 9}, [1, 9], [0, 10], "be from 1 to 9"),
    ],
)
def test_a_range_lets_in_what_it_says(declared, allowed, refused, words) -> None:
    declared_range = Range(**declared)
    assert all(value in declared_range for value in allowed)
    assert not any(value in declared_range for value in refused)
    assert str(declared_range) == words


def test_every_default_is_in_its_range() -> None:
    for cls in (
        RouterConfig,
        WorkerConfig,
        PrefillConfig,
        DecodeConfig,
        StoreConfig,
        UpConfig,
        DoctorConfig,
        SizeConfig,
    ):
        for item in settings_of(cls):
            range_ = item.range
            assert range_ is None or item.default in range_, f"{cls.__name__}.{item.name}"


def test_defaults_hold_where_nothing_is_given() -> None:
    assert resolve() == Example()


def test_flag_wins_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    path = write(tmp_path / "tandem.yaml", "port: 1\nhost: file\nratio: 0.1\n")
    environ = {"TANDEM_PORT": "2", "TANDEM_HOST": "environment"}
    settings = resolve("--config", path, "--port", "3", environ=environ)
    assert (settings.port, settings.host, settings.ratio) == (3, "environment", 0.1)


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "a.toml"])
def test_file_may_be_yaml_or_toml_with_kebab_or_snake_keys(tmp_path: Path, name: str) -> None:
    text = (
        'api_key = ["a", "b"]\nkv-cache-memory-bytes = "1KiB"\ncaching = false\nratio = 1'
        if name.endswith(".toml")
        else "api_key: [a, b]\nkv-cache-memory-bytes: 1KiB\ncaching: false\nratio: 1"
    )
    settings = resolve("--config", write(tmp_path / name, text))
    assert settings == Example(api_key=("a", "b"), kv_cache_memory_bytes=1024, caching=False, ratio=1.0)


def test_config_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    path = write(tmp_path / "tandem.yaml", "port: 1")
    assert resolve(environ={"TANDEM_CONFIG": path}).port == 1


def test_every_type_is_read_from_flags() -> None:
    settings = resolve(
        *("--port=9", "--api-key", "a", "b", "--api-key", "c", "--ratio", "1e-1", "--no-caching", "-tp", "4"),
        *("--kv_cache_memory_bytes", "2GiB", "--dtype", "float32"),
    )
    assert settings == Example(
        port=9,
        api_key=("a", "b", "c"),
        ratio=0.1,
        kv_cache_memory_bytes=2 << 30,
        caching=False,
        dtype="float32",
        num_shards=4,
    )


def test_environment_separates_members_by_commas_and_an_empty_variable_is_not_set() -> None:
    settings = resolve(environ={"TANDEM_API_KEY": "a, b", "TANDEM_PORT": "", "TANDEM_CACHING": "off"})
    assert settings == Example(api_key=("a", "b"), caching=False)


def test_none_may_be_said_where_the_type_allows_it() -> None:
    assert resolve("--kv-cache-memory-bytes", "none").kv_cache_memory_bytes is None
    assert "'none' is not a whole number" in refusal("--port", "none")


@pytest.mark.parametrize(
    ("text", "value"),
    [("512", 512), ("4GiB", 4 << 30), ("4G", 4 << 30), ("4g", 4 * 10**9), ("4GB", 4 * 10**9), ("1.5K", 1536)],
)
def test_quantities(text: str, value: int) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["", "G", "-1", "1Q", "1 2", "0.3", "1e3", "nan"])
def test_malformed_quantities_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "many"], "--port: 'many' is not a whole number"),
        (["--port", "0x10"], "--port: '0x10' is not a whole number"),
        (["--ratio", "inf"], "--ratio: 'inf' is not a number"),
        (["--dtype", "int3"], "--dtype: 'int3' is not one of auto, float32"),
        (["--prot", "1"], "--prot is not a setting; did you mean --port?"),
        (["--por", "1"], "--por is not a setting; did you mean --port?"),
        (["stray"], "'stray' belongs to no flag"),
        (["--port"], "--port: expected one argument"),
        (["--port", "70000"], "--port: must be from 0 to 65535, got 70000"),
        (["--ratio", "2"], "--ratio: must be above 0 and at most 1, got 2.0"),
        (["--host", "", "-tp", "2"], "num_shards: several need a host"),
    ],
)
def test_bad_flags_are_refused_by_name(argv: list[str], message: str) -> None:
    assert refusal(*argv) == message


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"TANDEM_PORT": "many"}, "environment variable TANDEM_PORT: 'many' is not a whole number"),
        ({"TANDEM_PROT": "1"}, "environment variable TANDEM_PROT is not a setting; did you mean TANDEM_PORT?"),
        ({"TANDEM_CACHING": "maybe"}, "environment variable TANDEM_CACHING: 'maybe' is not true or false"),
        ({"TANDEM_PORT": "70000"}, "environment variable TANDEM_PORT: must be from 0 to 65535, got 70000"),
    ],
)
def test_bad_variables_are_refused_by_name(environ: dict[str, str], message: str) -> None:
    assert refusal(environ=environ) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "{path}: prot is not a setting; did you mean port?"),
        ("port: many", "{path}: port: 'many' is not a whole number"),
        ("port: true", "{path}: port: True is not a whole number"),
        ("port: [1]", "{path}: port: it takes one value"),
        ("port:", "{path}: port: it needs a value"),
        ("host: 8080", "{path}: host: 8080 is not text: put it in quotes"),
        ("ratio: .nan", "{path}: ratio: nan is not a number"),
        ("caching: 1", "{path}: caching: 1 is not true or false"),
        ("port: 1\nport: 2", "{path}: port is there twice"),
        ("max-x: 1\nmax_x: 1", "{path}: max-x is not a setting"),
        ("- 1", "{path}: expected one setting per line, as in `max-num-seqs: 8`"),
        ("num-shards: 1\nnum_shards: 2", "{path}: num_shards is there twice"),
    ],
)
def test_bad_files_are_refused_by_place(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    assert refusal("--config", path) == message.format(path=path)


def test_unreadable_and_unparsable_files_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal("--config", str(tmp_path / "absent.yaml"))
    assert "must end in .yaml, .yml or .toml" in refusal("--config", write(tmp_path / "a.json", "{}"))
    assert "a.yaml" in refusal("--config", write(tmp_path / "a.yaml", "port: ["))
    assert "a.toml" in refusal("--config", write(tmp_path / "a.toml", "port ="))


def test_settings_of_other_services_are_passed_over_in_file_and_environment(tmp_path: Path) -> None:
    assert {"max_num_seqs", "kv_port", "peer_secret_file"} <= names_of_all_services()
    path = write(tmp_path / "deployment.yaml", "max-num-seqs: 4\nkv-port: 5\nport: 1")
    assert resolve("--config", path, environ={"TANDEM_MAX_NUM_SEQS": "8", "TANDEM_KV_PORT": "5"}).port == 1


def test_other_services_flags_are_not_passed_over() -> None:
    assert refusal("--max-num-seqs", "8") == "--max-num-seqs is not a setting"


def test_kubernetes_service_links_are_not_mistaken_for_settings() -> None:
    environ = {
        "TANDEM_PORT": "tcp://10.0.0.7:8000",
        "TANDEM_SERVICE_HOST": "10.0.0.7",
        "TANDEM_ROUTER_PORT_8000_TCP_ADDR": "10.0.0.7",
        "TANDEM_ROUTER_SERVICE_PORT_HTTP": "8000",
    }
    assert resolve(environ=environ) == Example()


def test_a_variable_of_nothing_but_commas_is_not_taken_for_no_keys() -> None:
    for text in (" ", ",", " , "):
        with pytest.raises(SettingsError) as caught:
            resolve(environ={"TANDEM_API_KEY": text})
        assert str(caught.value).startswith("environment variable TANDEM_API_KEY")


def test_secrets_show_nowhere() -> None:
    settings = resolve("--api-key", "hunter2")
    shown = [repr(settings), str(argv_of(settings_of(Example), vars(settings)))]
    assert not any("hunter2" in text for text in shown)
    assert secret_environment(settings_of(Example), {"api_key": settings.api_key}) == {"TANDEM_API_KEY": "hunter2"}


def test_a_malformed_secret_is_not_quoted_in_the_refusal() -> None:
    @dataclass(frozen=True)
    class Locked:
        pin: int = setting(0, help="a secret number", secret=True)

    with pytest.raises(SettingsError) as caught:
        resolve_settings(Locked, ["--pin", "12x4"], {})
    assert str(caught.value) == "--pin: the value (a secret, so not shown) is malformed"


def test_argv_gives_the_same_settings_again() -> None:
    settings = Example(port=1, ratio=0.25, caching=False, kv_cache_memory_bytes=7, dtype="float32", num_shards=2)
    assert resolve(*argv_of(settings_of(Example), vars(settings))) == settings


def test_a_mistake_ends_the_process_with_status_2_and_says_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(Example, ["--prot", "1"], prog="tandem x", environ={})
    assert caught.value.code == 2
    assert "tandem x: error: --prot is not a setting" in capsys.readouterr().err


def test_help_lists_flags_defaults_and_the_other_sources(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(Example, ["--help"], prog="tandem x", description="Serves.", environ={})
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for part in ("--port N", "port of the HTTP API (default: 8000)", "--caching, --no-caching", "TANDEM_PORT"):
        assert part in text
