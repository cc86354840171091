"""Wrong uses of Tandem, as its users make them: a few lines that say what, where and what to do, and status 2.

Real processes. Where the model's files or the settings tell, neither is torch imported nor a child started.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.cli.config import DEMO_MODEL
from services.cli.embedded_redis import EmbeddedRedis
from services.engine.model_config import parse_config
from tests.cli.hub_stub import hub_stub
from tests.ports import free_port
from tests.safetensors_files import write_shards, write_weights

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TIMEOUT_S = 120.0
MAX_LINES = 6

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "dtype": "float32",
}


@dataclass(frozen=True)
class Outcome:
    status: int
    said: str
    witnessed: str


@dataclass(frozen=True)
class Tandem:
    """Runs `tandem COMMAND`, and watches what it imports and starts."""

    directory: Path

    def __call__(self, *argv: str, **environ: str) -> Outcome:
        return self.watch("-m", "services.cli.main", *argv, **environ)

    def watch(self, *argv: str, **environ: str) -> Outcome:
        """Run Python."""
        witness = self.directory / "witness"
        path = os.pathsep.join([environ.pop("PYTHONPATH", ""), str(HERE / "witness"), os.environ.get("PYTHONPATH", "")])
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TANDEM_", "HF_"))}
        own = {"WITNESS": str(witness), "HF_HOME": str(self.directory / "hub"), "NO_COLOR": "1", "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, *argv],
            cwd=ROOT,
            env={**kept, **own, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=TIMEOUT_S,
        )
        return Outcome(done.returncode, done.stdout, witness.read_text())


@pytest.fixture
def tandem(tmp_path: Path) -> Tandem:
    return Tandem(tmp_path)


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("import torch", "torch"),
        ("import subprocess; subprocess.run(['true'])", "child: subprocess.Popen true"),
        ("import os; os.fork() or os._exit(0); os.wait()", "child: os.fork"),
        ("pass", ""),
    ],
)
def test_what_watches_sees_torch_and_children(code: str, seen: str, tandem: Tandem) -> None:
    outcome = tandem.watch("-c", code, PYTHONPATH=str(HERE / "torch_for_cuda"))
    assert outcome.witnessed.strip() == seen


def check(outcome: Outcome, *parts: str, is_told_by_files: bool = True) -> None:
    """What is wrong, where and the remedy, in this order in one line; little else; status 2."""
    assert outcome.status == 2, outcome.said
    assert "Traceback" not in outcome.said
    assert len(outcome.said.splitlines()) <= MAX_LINES, outcome.said
    lines = [line for line in outcome.said.splitlines() if parts[0] in line]
    assert len(lines) == 1, outcome.said
    where = 0
    for part in parts:
        where = lines[0].find(part, where)
        assert where >= 0, f"{part!r} is not where it belongs in: {lines[0]}"
    if is_told_by_files:
        assert outcome.witnessed == ""


def write_model(directory: Path, **changes: object) -> Path:
    """A model with nothing wrong but what `changes` make wrong; a change to None removes a key."""
    directory.mkdir(exist_ok=True)
    config = {name: value for name, value in (LLAMA | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    write_weights(directory, parse_config(LLAMA))
    return directory


def only_gguf(model: Path) -> None:
    for file in model.iterdir():
        file.unlink()
    (model / "model.Q4_K_M.gguf").write_bytes(b"GGUF")


def adapter(model: Path) -> None:
    (model / "config.json").rename(model / "adapter_config.json")


def makers_format(model: Path) -> None:
    (model / "config.json").rename(model / "params.json")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def missing_shard(model: Path) -> None:
    no_weights(model)
    write_shards(model, parse_config(LLAMA), 3)[1].unlink()


def index_without_map(model: Path) -> None:
    no_weights(model)
    (model / "model.safetensors.index.json").write_text("{}")


def truncated(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def lfs_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def damaged_header(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(9)
        file.write(b"\xff\xff")


def not_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"<html>404</html>" * 10)


def other_weights(model: Path) -> None:
    write_weights(model, parse_config(LLAMA | {"hidden_size": 64}))


def fewer_layers(model: Path) -> None:
    write_weights(model, parse_config(LLAMA | {"num_hidden_layers": 1}))


def stored_in_fp8(model: Path) -> None:
    write_weights(model, parse_config(LLAMA), "F8_E4M3")


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def cut_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0", "trunc')


def bad_template(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }")


def nothing(model: Path) -> None:
    for file in model.iterdir():
        file.unlink()


def cut_config(model: Path) -> None:
    (model / "config.json").write_text('{"architectures": ["Llama')


def list_as_config(model: Path) -> None:
    (model / "config.json").write_text("[]")


FILES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "an empty directory": (nothing, ("{model} has no config.json", "correct the path")),
    "GGUF": (only_gguf, ("{model} has no config.json", "GGUF is not read", "take the repository")),
    "an adapter": (adapter, ("{model} has no config.json", "adapter", "merge it")),
    "its maker's format": (makers_format, ("{model} has no config.json", "take the repository for transformers")),
    "half a config.json": (cut_config, ("{model}/config.json is not JSON", "download it again")),
    "a list as config.json": (list_as_config, ("{model}/config.json must hold a JSON object",)),
    "no weights": (no_weights, ("{model} has neither model.safetensors nor", "download them")),
    "pickled weights": (pickled, ("{model} has neither", "pytorch_model.bin", "convert them")),
    "a missing shard": (missing_shard, ("{model} lacks model-00002-of-00003.safetensors", "3 files", "download")),
    "an index without files": (index_without_map, ("{model}/model.safetensors.index.json has no weight_map", "again")),
    "half a checkpoint": (truncated, ("{model}/model.safetensors is cut short", "bytes instead of", "download it")),
    "a pointer of git-lfs": (lfs_pointer, ("{model}/model.safetensors is a pointer of git-lfs", "`git lfs pull`")),
    "a damaged header": (damaged_header, ("{model}/model.safetensors has a damaged header", "download it again")),
    "a page of HTML": (not_weights, ("{model}/model.safetensors is not a safetensors file", "download it again")),
    "weights of another model": (other_weights, ("{model}: the weights do not fit config.json", "not [64, 32]")),
    "weights of too few layers": (fewer_layers, ("{model}: the weights do not fit config.json", "lacks model.layers")),
    "weights in fp8": (stored_in_fp8, ("{model}: the weights do not fit config.json", "F8_E4M3", "only F32")),
    "no tokenizer": (no_tokenizer, ("{model} has no tokenizer.json", "--tokenizer")),
    "half a tokenizer": (cut_tokenizer, ("{model}/tokenizer.json is not JSON", "download it again")),
    "a bad chat template": (bad_template, ("{model}: the chat template cannot be parsed", "--chat-template")),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_wrong_files(name: str, tandem: Tandem, tmp_path: Path) -> None:
    spoil, parts = FILES[name]
    model = write_model(tmp_path / "model")
    spoil(model)
    check(tandem("up", "--model", str(model)), *(part.format(model=model) for part in parts))


CONFIGS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "another architecture": ({"architectures": ["MambaForCausalLM"]}, ("'MambaForCausalLM' is not", "choose")),
    "no architecture": ({"architectures": None}, ("must name one architecture",)),
    "AWQ": ({"quantization_config": {"quant_method": "awq"}}, ("quantized with awq", "take the repository")),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq"}}, ("quantized with gptq", "take the repository")),
    "experts": ({"num_local_experts": 8}, ("num_local_experts 8 is not supported", "choose a model without")),
    "a missing key": ({"vocab_size": None}, ("lacks vocab_size",)),
    "a rope of another kind": ({"rope_scaling": {"rope_type": "longrope"}}, ("rope type 'longrope' is not supported",)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_configurations(name: str, tandem: Tandem, tmp_path: Path) -> None:
    changes, parts = CONFIGS[name]
    model = write_model(tmp_path / "model", **changes)
    check(tandem("up", "--model", str(model)), f"{model}/config.json", *parts)


def test_a_path_that_is_not_there_and_a_file(tandem: Tandem, tmp_path: Path) -> None:
    check(tandem("up", "--model", "/no/such/model"), "/no/such/model is not there", "give the directory")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    check(tandem("up", "--model", str(file)), f"{file} is GGUF, which is not read", "take the repository")


def test_a_path_that_is_no_text(tandem: Tandem, tmp_path: Path) -> None:
    model = write_model(Path(os.fsdecode(bytes(tmp_path) + b"/mod\xe9l")))
    check(tandem("up", "--model", str(model)), "mod\\udce9l'", "no UTF-8", "rename it")


# ---- the hub -----------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with hub_stub() as url:
        yield url


@pytest.mark.parametrize(
    ("argv", "environ", "parts"),
    [
        (("me/gated",), {}, ("me/gated is gated, and there is no token", "HF_TOKEN")),
        (("me/gated",), {"HF_TOKEN": "hf_x"}, ("me/gated is gated, and this token may not read it", "ask for access")),
        (("me/absent",), {}, ("me/absent is no directory here", "or it is private", "correct the name")),
        (("me/revision", "--revision", "v9"), {}, ("me/revision has no revision 'v9'", "--revision")),
        (("me/absent",), {"HF_HUB_OFFLINE": "1"}, ("me/absent is neither", "HF_HUB_OFFLINE is set", "unset it")),
        (("a name",), {}, ("a name is neither a directory here nor a name that the hub", "correct it")),
    ],
)
def test_names_that_the_hub_does_not_give(
    argv: tuple[str, ...], environ: dict[str, str], parts: tuple[str, ...], tandem: Tandem, hub: str
) -> None:
    check(tandem("up", "--model", *argv, HF_ENDPOINT=hub, **environ), *parts)


def test_a_name_on_the_hub_without_a_network(tandem: Tandem) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    outcome = tandem("up", "--model", "me/model", HF_ENDPOINT=url)
    check(outcome, "me/model is neither a directory here nor in the hub's cache", f"{url} cannot be reached", "network")


# ---- what the settings ask of this machine ------------------------------------


def pretend(directory: Path, *, memory_bytes: int = 8 << 30, flags: str = "avx2", num_gpus: int = 0) -> dict[str, str]:
    """The environment of a process that sees a machine made up."""
    files = {
        "proc/meminfo": f"MemAvailable: {memory_bytes >> 10} kB\n",
        "proc/cpuinfo": f"flags : {flags}\n",
        "cgroup/memory.max": "max\n",
        **{f"dev/nvidia{index}": "" for index in range(num_gpus)},
    }
    for name, text in files.items():
        path = directory / "machine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"PRETENDED_MACHINE": str(directory / "machine")}


SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, int | str], tuple[str, ...]]] = {
    "no CUDA device": (("--device", "cuda"), {}, ("--device cuda", "torch is built for CPUs", "--device cpu")),
    "a context too long": (
        ("--max-model-len", "8k"), {}, ("--max-model-len 8000", "128 tokens", "config.json", "give 128 or less"),
    ),
    "no room for one request": (
        ("--kv-cache-memory-bytes", "1KiB"), {}, ("one request of 128 tokens", "--kv-cache-memory-bytes 1024 holds 0",
         "by --kv-cache-memory-bytes"),
    ),
    "too few blocks for one request": (
        ("--num-gpu-blocks-override", "3"), {}, ("--num-gpu-blocks-override 3 holds 3", "give --max-model-len 96"),
    ),
    "KV larger than the machine": (
        ("--kv-cache-memory-bytes", "5GiB"), {}, ("--kv-cache-memory-bytes: 2 workers need 10.0 GiB", "8.0 GiB are"
         " available on this machine", "give less"),
    ),
    "a host tier larger than the machine": (
        ("--kv-offloading-size", "5"), {}, ("--kv-offloading-size: 2 workers want 10 GiB", "8.0 GiB"),
    ),
    "weights larger than the machine": (
        (), {"memory_bytes": 100 << 10}, ("/model: 2 workers need", "for weights", "available on this machine",
         "--colocated"),
    ),
    "int8 on the wrong processor": (
        ("--quantization", "int8", "--dtype", "bfloat16"), {}, ("--quantization int8: this processor lacks bmi2, fma;",
         "leave --quantization out"),
    ),
    "int8 on ARM": (
        ("--quantization", "int8", "--dtype", "bfloat16"), {"flags": "asimd"}, ("--quantization int8: on ARM it needs"
         " --cpu-kernels neon",),
    ),
    "kernels of another processor": (
        ("--cpu-kernels", "avx512", "--dtype", "bfloat16"), {}, ("--cpu-kernels avx512: this processor lacks",
         "avx512_bf16", "leave --cpu-kernels out"),
    ),
    "kernels for float32": (
        ("--cpu-kernels", "avx2"), {}, ("--cpu-kernels avx2: it is for bfloat16", "/model is float32",
         "--dtype bfloat16"),
    ),
    "int8 of float32": (
        ("--quantization", "int8"), {}, ("--quantization int8: it is for bfloat16", "/model is float32",
         "--dtype bfloat16"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_this_machine_cannot_satisfy(name: str, tandem: Tandem, tmp_path: Path) -> None:
    argv, machine, parts = SETTINGS[name]
    model = write_model(tmp_path / "model")
    check(tandem("up", "--model", str(model), *argv, **pretend(tmp_path, **machine)), *parts)


@pytest.mark.parametrize(
    ("argv", "num_gpus", "parts"),
    [
        (
            ("--max-model-len", "32"),
            1,
            ("/big: one worker needs", "for weights", "available on GPU 0", "smaller model"),
        ),
        (("--quantization", "int8"), 1, ("--quantization int8: it is for CPUs", "--device cpu")),
        (
            ("--kv-cache-dtype", "int8"),
            1,
            ("--kv-cache-dtype int8: it is for CPUs, and this is a GPU", "--device cpu", "--engine vllm"),
        ),
        (("--device", "cuda"), 0, ("--device cuda: no NVIDIA device is to be seen", "nvidia-smi")),
    ],
)
def test_what_a_gpu_cannot_do(
    argv: tuple[str, ...], num_gpus: int, parts: tuple[str, ...], tandem: Tandem, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "big", num_hidden_layers=20)
    write_weights(model, parse_config(LLAMA | {"num_hidden_layers": 20}))
    environ = pretend(tmp_path, num_gpus=num_gpus) | {"PYTHONPATH": str(HERE / "torch_for_cuda")}
    check(tandem("up", "--colocated", "--model", str(model), *argv, **environ), *parts)


# ---- the processes by themselves, and what they need around them --------------


@pytest.mark.parametrize("role", ["prefill", "decode", "elastic"])
@pytest.mark.parametrize("spoil", [truncated, missing_shard, nothing])
def test_a_worker_says_the_same_before_torch(
    role: str, spoil: Callable[[Path], None], tandem: Tandem, tmp_path: Path
) -> None:
    _, parts = next(case for case in FILES.values() if case[0] is spoil)
    model = write_model(tmp_path / "model")
    spoil(model)
    outcome = tandem(role, "--model", str(model), "--log-format", "text")
    check(outcome, f"{role} worker cannot start: {parts[0].format(model=model)}", *parts[1:])


def test_sizing_says_the_same(tandem: Tandem, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", **CONFIGS["AWQ"][0])
    check(tandem("size", "--model", str(model)), f"{model}/config.json", *CONFIGS["AWQ"][1])


@pytest.fixture(scope="module")
def guarded_redis() -> Iterator[str]:
    """The address of a Redis that wants a password."""
    import redis

    with EmbeddedRedis.start() as server:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", "hunter2")
        yield f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("command", ["up", "router", "store", "decode"])
def test_a_wrong_password(command: str, tandem: Tandem, guarded_redis: str) -> None:
    model = ("--model", str(DEMO_MODEL)) if command in ("up", "decode") else ()
    port = ("--port", "0") if command in ("up", "router") else ()
    outcome = tandem(command, *model, *port, "--redis", f"redis://:wrong@{guarded_redis}/0")
    check(outcome, f"Redis at redis://{guarded_redis}/0 refuses us", "correct user and password in --redis")
    assert "wrong@" not in outcome.said


def test_a_redis_that_does_not_answer(tandem: Tandem) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    outcome = tandem("up", "--port", "0", "--redis", url)
    check(outcome, f"Redis at {url} does not answer", "start it, or correct --redis")


def test_a_url_of_something_else(tandem: Tandem) -> None:
    check(
        tandem("router", "--port", "0", "--redis", "http://127.0.0.1"),
        "http://127.0.0.1 is no URL of a Redis",
        "--redis",
    )


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield str(taken.getsockname()[1])


@pytest.mark.parametrize("command", ["up", "router"])
def test_a_port_in_use(command: str, tandem: Tandem, taken_port: str, redis_url: str) -> None:
    outcome = tandem(command, "--port", taken_port, "--redis", redis_url)
    check(outcome, f"cannot listen on 127.0.0.1:{taken_port}", "--port")


@pytest.mark.parametrize("flag", ["--port", "--kv-port", "--http-port"])
def test_a_workers_port_in_use(flag: str, tandem: Tandem, taken_port: str, redis_url: str) -> None:
    outcome = tandem("decode", "--model", str(DEMO_MODEL), "--redis", redis_url, flag, taken_port)
    check(outcome, "decode worker cannot start: cannot listen on", taken_port, f"give another --host or {flag}")


def test_ucx_that_cannot_be_had(tandem: Tandem, redis_url: str) -> None:
    argv = ("decode", "--model", str(DEMO_MODEL), "--redis", redis_url, "--num-gpu-blocks-override", "128")
    outcome = tandem(*argv, "--kv-transport", "ucxx", "--log-level", "warning", UCX_TLS="nonsense", OMP_NUM_THREADS="1")
    check(outcome, "UCX cannot start: No such device", "see UCX_TLS", is_told_by_files=False)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("--chat-template", "/no/such.jinja"), ("--chat-template /no/such.jinja", "cannot be read", "give a Jinja")),
        (("--chat-template", "{{ unclosed"), ("--chat-template: ", "cannot be parsed", "give a Jinja template")),
        (("--tokenizer", "/no/such"), ("--tokenizer /no/such", "no tokenizer.json", "give a directory")),
        (("--ssl-certfile", "/no.pem", "--ssl-keyfile", "/no.key"), ("--ssl-certfile /no.pem", "No such file", "give")),
    ],
)
def test_wrong_files_of_the_router(
    argv: tuple[str, ...], parts: tuple[str, ...], tandem: Tandem, redis_url: str
) -> None:
    check(tandem("router", "--port", "0", "--redis", redis_url, *argv), *parts)


def test_a_tokenizer_that_only_the_router_finds_wrong_ends_the_start(tandem: Tandem, tmp_path: Path) -> None:
    model = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    outcome = tandem("up", "--colocated", "--port", "0", "--model", str(model), "--num-gpu-blocks-override", "128")
    assert outcome.status == 2
    assert outcome.said.splitlines()[-1].startswith("tandem   | ")
    assert f"{model}/tokenizer.json cannot be loaded" in outcome.said.splitlines()[-1]


def test_a_chat_template_that_is_not_there_is_noticed_before_anything_starts(tandem: Tandem) -> None:
    outcome = tandem("up", "--port", "0", "--chat-template", "/no/such.jinja")
    check(outcome, "--chat-template /no/such.jinja", "cannot be read", "give a Jinja template")


@pytest.mark.parametrize("command", ["store", "up"])
def test_a_directory_that_cannot_be_written(command: str, tandem: Tandem, tmp_path: Path, redis_url: str) -> None:
    (tmp_path / "file").touch()
    directory = str(tmp_path / "file" / "blocks")
    argv = ("--stores", "1", "--port", "0") if command == "up" else ()
    outcome = tandem(command, *argv, "--redis", redis_url, "--store-disk-dir", directory)
    check(outcome, f"--store-disk-dir {directory}", "Not a directory", "may write to")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("--worker-id", "two words"), ("--worker-id: must be at most 256 printable ASCII", "'two words'")),
        (("--served-model-name", ""), ("--served-model-name: must not be empty",)),
        (("--num-threads", "99999"), ("--num-threads: must be from 0 to 1024, got 99999",)),
        (("--host", "0.0.0.0"), ("--host: others reach 0.0.0.0", "give --peer-secret-file, too")),
        (
            ("--host", "0.0.0.0", "--peer-secret-file", "s"),
            ("--host: 0.0.0.0 is no address that others can dial", "--advertise-host"),
        ),
        (("--peer-secret-file", "/nonexistent/s"), ("--peer-secret-file /nonexistent/s: No such file",)),
        (("--proof-key-file", "/dev/null"), ("--proof-key-file /dev/null: others can read it; chmod 600 /dev/null",)),
    ],
)
def test_settings_of_a_worker_that_none_can_have(argv: tuple[str, ...], parts: tuple[str, ...], tandem: Tandem) -> None:
    check(tandem("decode", "--model", str(DEMO_MODEL), *argv), *parts)


def test_a_misspelled_flag_and_a_command_that_is_none(tandem: Tandem) -> None:
    check(tandem("up", "--modle", "x"), "--modle is not a setting", "did you mean --model?")
    check(tandem("upp"), "'upp' is no command", "there are up")
