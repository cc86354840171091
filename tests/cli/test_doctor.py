"""`tandem doctor`: what it finds, and the remedy it names."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from services.cli.config import DoctorConfig
from services.cli.doctor import machine
from services.cli.doctor.doctor import (
    format_finding,
    main,
    report,
)
from services.cli.doctor.engine import check_engine
from services.cli.doctor.examination import checks_of, examine
from services.cli.doctor.findings import (
    Finding,
    ProbeFailed,
    ProbeTimedOut,
    Verdict,
    broken,
    good,
    probe,
    refused,
    worse,
)
from services.cli.doctor.machine import (
    check_kernels,
    check_memory,
    check_port,
    check_processor,
)
from services.cli.doctor.model import check_model
from services.cli.doctor.packages import check_packages
from services.cli.doctor.registry import check_redis
from services.cli.doctor.transports import check_cross_memory_attach, check_rdma, check_ucx_devices, ucx_resources
from services.engine import check, checkpoint, choice
from services.engine.model_config import parse_config
from services.hub import NotOnHub
from services.machine import Gpu
from services.settings import SettingsError
from services.settings.load import resolve_settings
from services.startup import claim_port
from tests.safetensors_files import write_weights

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 1,
}


def model_directory(path: Path, **changes: object) -> str:
    (path / "config.json").write_text(json.dumps(LLAMA | changes))
    (path / "tokenizer.json").write_text("{}")
    write_weights(path, parse_config(LLAMA))
    return str(path)


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_this_environment_has_the_packages() -> None:
    assert {finding.verdict for finding in check_packages()} == {Verdict.GOOD}


def test_private_redis_starts_and_is_new_enough() -> None:
    assert only(check_redis("")).verdict is Verdict.GOOD


def test_a_redis_that_answers_is_good(redis_url: str) -> None:
    assert only(check_redis(redis_url)).verdict is Verdict.GOOD


def test_a_redis_that_does_not_answer_is_broken_and_its_password_stays_hidden() -> None:
    finding = only(check_redis(f"redis://user:hunter2@127.0.0.1:{claim_port('127.0.0.1', 0)}/0"))
    assert finding.verdict is Verdict.BROKEN
    assert "hunter2" not in finding.detail + finding.remedy
    assert "--redis" in finding.remedy


def test_a_taken_port_is_broken_and_a_free_one_good() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finding = only(check_port("127.0.0.1", taken.getsockname()[1]))
    assert finding.verdict is Verdict.BROKEN
    assert "--port" in finding.remedy
    assert only(check_port("127.0.0.1", claim_port("127.0.0.1", 0))).verdict is Verdict.GOOD


def test_a_model_directory_is_read_and_measured(tmp_path: Path) -> None:
    finding = only(check_model(DoctorConfig(model=model_directory(tmp_path))))
    assert finding.verdict is Verdict.GOOD
    assert "0 MiB of weights, context 128" in finding.detail


def test_an_unsupported_architecture_is_broken_by_name(tmp_path: Path) -> None:
    finding = only(check_model(DoctorConfig(model=model_directory(tmp_path, architectures=["MambaForCausalLM"]))))
    assert finding.verdict is Verdict.BROKEN
    assert "MambaForCausalLM" in finding.detail


@pytest.mark.parametrize(
    ("engine", "architecture", "installed", "says", "serves"),
    [
        ("native", "LlamaForCausalLM", None, "native: as --engine native says", True),
        ("native", "MambaForCausalLM", None, "native: as --engine native says; auto would take vllm: the native", True),
        ("auto", "LlamaForCausalLM", "0.33.0", "native: the model is one of its own", True),
        ("auto", "MambaForCausalLM", "0.32.0+cpu", "vllm: the native engine does not compute the model: ", True),
        ("auto", "MambaForCausalLM", None, "vllm: the native engine does not compute the model: ", False),
        ("vllm", "LlamaForCausalLM", "0.30.0+cpu", "vllm: as --engine vllm says; auto would take native", False),
    ],
)
def test_the_engine_is_named_with_its_reason_and_vllm_with_its_version(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    architecture: str,
    installed: str | None,
    says: str,
    serves: bool,
) -> None:
    monkeypatch.setattr(choice, "vllm_version", lambda: installed)
    model = model_directory(tmp_path, architectures=[architecture])
    chosen, vllm = check_engine(DoctorConfig(model=model, engine=engine))
    assert (chosen.verdict, chosen.subject, vllm.subject) == (Verdict.GOOD, "engine", "vLLM")
    assert chosen.detail.startswith(says)
    assert (vllm.verdict is not Verdict.BROKEN) is serves
    assert "make install-vllm" in vllm.detail + vllm.remedy or installed == "0.32.0+cpu"


@pytest.mark.parametrize(
    ("flags", "gpus", "says"),
    [
        ("--quantization awq", [], "vllm: --quantization awq is vLLM's"),
        ("--lora-modules sql=/adapters/sql", [], "vllm: adapters (--lora-modules) are computed by vLLM"),
        ("", [Gpu("0")], "vllm: there is a GPU"),
        ("--device cpu", [Gpu("0")], "native: the model is one of its own"),
        ("--device cuda", [], "--device cuda: "),
        ("--tensor-parallel-size 2", [], "these are vLLM's flags, and auto takes the native engine here: "),
        ("--tensor-parallel-size 2 --device cuda", [Gpu("0")], "vllm: there is a GPU"),
        ("--pipeline-parallel-size 2", [], "--pipeline-parallel-size is refused: "),
        ("--quantization int8", [Gpu("0")], "int8 is the native engine's"),
        ("--kv-cache-dtype fp8", [], "vllm: --kv-cache-dtype fp8 is vLLM's"),
        ("--kv-cache-dtype int8", [], "native: the model is one of its own"),
        ("--kv-cache-dtype int8", [Gpu("0")], "int8 is the native engine's"),
    ],
)
def test_the_engine_is_that_which_tandem_up_would_take_with_the_same_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, gpus: list[Gpu], says: str
) -> None:
    here = check.Machine(8 << 30, gpus, frozenset())
    monkeypatch.setattr(check.Machine, "this", lambda: here)
    monkeypatch.setattr(choice, "vllm_version", lambda: "0.32.0" if gpus else "0.32.0+cpu")
    argv = ["--model", model_directory(tmp_path), "--engine", "auto", *flags.split()]
    try:
        found = check_engine(resolve_settings(DoctorConfig, argv, {}))
    except SettingsError as error:
        found = [refused("engine", error)]
    assert any(says in finding.detail for finding in found), found


def test_of_a_model_for_vllm_the_files_are_looked_at(tmp_path: Path) -> None:
    model = model_directory(tmp_path, architectures=["MambaForCausalLM"])
    assert only(check_model(DoctorConfig(model=model, engine="auto"))).verdict is Verdict.GOOD
    (tmp_path / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in only(check_model(DoctorConfig(model=model, engine="vllm"))).detail


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_model_without_a_file_is_broken_by_name(tmp_path: Path, name: str) -> None:
    model = model_directory(tmp_path)
    (tmp_path / name).unlink()
    finding = only(check_model(DoctorConfig(model=model)))
    assert finding.verdict is Verdict.BROKEN
    assert name.removeprefix("model") in finding.detail


def test_a_directory_without_a_model_is_broken(tmp_path: Path) -> None:
    assert only(check_model(DoctorConfig(model=str(tmp_path)))).verdict is Verdict.BROKEN


def test_a_hub_name_is_worse_than_a_directory_and_broken_where_the_hub_does_not_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_directory(tmp_path)
    monkeypatch.setattr(checkpoint, "fetch", lambda name, revision, patterns: tmp_path)
    assert only(check_model(DoctorConfig(model="Qwen/Qwen3-0.6B"))).verdict is Verdict.WORSE

    def fail(name: str, revision: str, patterns: object) -> Path:
        raise NotOnHub(f"{name} is gated, and there is no token; give your token as HF_TOKEN")

    monkeypatch.setattr(checkpoint, "fetch", fail)
    finding = only(check_model(DoctorConfig(model="Qwen/Qwen3-0.6B")))
    assert finding == broken("model", "Qwen/Qwen3-0.6B is gated, and there is no token", "give your token as HF_TOKEN")


def test_a_model_that_does_not_fit_twice_is_told_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "available_memory_bytes", lambda: 1 << 10)
    finding = check_model(DoctorConfig(model=model_directory(tmp_path)))[1]
    assert (finding.verdict, finding.subject) == (Verdict.WORSE, "model memory")
    assert "2 workers need" in finding.detail
    assert "--colocated" in finding.remedy


def test_a_processor_without_bfloat16_is_told_to_use_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "processor_flags", lambda: {"fpu", "avx2"})
    finding = check_processor()[-1]
    assert (finding.verdict, finding.remedy) == (Verdict.WORSE, "give CPU workers --dtype float32")
    monkeypatch.setattr(machine, "processor_flags", lambda: {"fpu", "avx2", "fma", "bmi2"})
    finding = check_processor()[-1]
    assert (finding.verdict, "the C kernels compute it in float32" in finding.detail) == (Verdict.GOOD, True)
    monkeypatch.setattr(machine, "processor_flags", lambda: {"fpu", "avx512_bf16", "amx_bf16"})
    assert check_processor()[-1].detail == "in hardware (amx_bf16, avx512_bf16)"


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ({"kernels": True, "expected": True, "reason": "avx512 kernels"}, Verdict.GOOD),
        ({"kernels": False, "expected": False, "reason": "torch, since the processor is old"}, Verdict.GOOD),
        ({"kernels": False, "expected": True, "reason": "torch, since nothing is built"}, Verdict.WORSE),
    ],
)
def test_kernels_are_missed_where_the_processor_could_run_them(
    said: dict[str, object], verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.cli.doctor.machine.probe", lambda code: said)
    finding = only(check_kernels())
    assert (finding.verdict, finding.detail) == (verdict, said["reason"])


def test_this_machines_kernels_are_reported() -> None:
    finding = only(check_kernels())
    assert finding.verdict is not Verdict.BROKEN
    assert finding.detail.startswith(("amx kernels", "avx512 kernels", "avx2 kernels", "torch"))


def test_memory_is_reported() -> None:
    assert check_memory()[0].subject == "memory"


def test_network_devices_that_others_reach_ucx_on_are_named() -> None:
    assert check_ucx_devices({}) == check_ucx_devices({"UCX_NET_DEVICES": "lo"}) == []
    finding = only(check_ucx_devices({"UCX_NET_DEVICES": "eth1"}))
    assert (finding.verdict, "UCX_NET_DEVICES=eth1" in finding.detail) == (Verdict.WORSE, True)


def test_ucx_resources_are_read_from_its_description() -> None:
    info = "# md 0 : component 0 self\n# resource 0 : md 0 dev 0 flags -- self/memory\n# resource 1 : md 1 -- tcp/lo \n"
    assert ucx_resources(info) == ["self/memory", "tcp/lo"]


def test_cross_memory_attach_has_a_verdict() -> None:
    finding = only(check_cross_memory_attach())
    assert finding.verdict in (Verdict.GOOD, Verdict.WORSE)
    assert bool(finding.remedy) == (finding.verdict is Verdict.WORSE)


def test_rdma_devices_need_lockable_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(check_rdma(tmp_path / "absent")).verdict is Verdict.GOOD
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr("resource.getrlimit", lambda what: (65536, -1))
    finding = only(check_rdma(tmp_path))
    assert (finding.verdict, finding.remedy) == (Verdict.BROKEN, "ulimit -l unlimited")
    monkeypatch.setattr("resource.getrlimit", lambda what: (-1, -1))
    assert only(check_rdma(tmp_path)) == good("RDMA", "mlx5_0")


def test_a_probe_that_crashes_or_hangs_or_babbles_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe("import json, sys; print('noise'); print(json.dumps(sys.argv[1]))", "x") == "x"
    with pytest.raises(ProbeFailed, match="exit status 1: ValueError: no"):
        probe("raise ValueError('no')")
    with pytest.raises(ProbeFailed, match="exit status -6"):
        probe("import os; os.abort()")
    with pytest.raises(ProbeFailed, match="unexpected output 'hello'"):
        probe("print('hello')")
    monkeypatch.setattr("services.cli.doctor.findings._PROBE_TIMEOUT_S", 0.1)
    with pytest.raises(ProbeTimedOut, match=r"no answer within 0.1 s"):
        probe("import signal; signal.pause()")
    with pytest.raises(ProbeTimedOut):  # nor may what it leaves running hold it up
        probe("import os, signal; os.fork(); signal.pause()")


async def test_checks_run_side_by_side() -> None:
    together = threading.Barrier(2)

    def meet() -> list[Finding]:
        together.wait(timeout=30)
        return [good("met", "")]

    assert [finding async for finding in examine({"a": meet, "b": meet})] == [good("met", "")] * 2


async def test_a_check_that_times_out_hangs_or_crashes_is_a_warning() -> None:
    def time_out() -> list[Finding]:
        raise ProbeTimedOut("no answer within 60 s")

    def crash() -> list[Finding]:
        raise ValueError("no")

    done = threading.Event()

    def hang() -> list[Finding]:
        done.wait(60)
        return []

    checks = {"torch": time_out, "ucxx": crash, "nixl": hang, "port": lambda: [good("port", "free")]}
    found = [finding async for finding in examine(checks, timeout_s=1.0)]
    done.set()
    assert [(finding.subject, finding.verdict) for finding in found] == [
        ("torch", Verdict.WORSE), ("ucxx", Verdict.WORSE), ("nixl", Verdict.WORSE), ("port", Verdict.GOOD),
    ]  # fmt: skip
    assert "ValueError('no')" in found[1].detail
    assert found[2].detail == "no answer within 1 s"


def test_findings_read_as_lines_with_the_remedy_below() -> None:
    assert format_finding(good("port", "free"), colored=False) == "✓ port: free"
    assert format_finding(worse("cma", "refused", "allow it"), colored=False) == "! cma: refused\n    → allow it"
    assert json.loads(report([broken("port", "taken", "another")], serves=False)) == {
        "serves": False,
        "findings": [{"verdict": "broken", "subject": "port", "detail": "taken", "remedy": "another"}],
    }


@pytest.mark.parametrize(("finding", "status"), [(worse("a", "b", "c"), 0), (broken("a", "b", "c"), 1)])
def test_exit_status_is_1_only_where_something_would_not_serve(
    finding: Finding, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = {"x": lambda: [good("x", "y")], "a": lambda: [finding]}
    monkeypatch.setattr("services.cli.doctor.examination.checks_of", lambda config: checks)
    assert main(["--json"]) == status
    assert json.loads(capsys.readouterr().out)["serves"] is (status == 0)
    assert main([]) == status
    assert ("Ready to serve." in capsys.readouterr().out) is (status == 0)


@pytest.mark.slow
async def test_a_whole_examination_covers_every_subject(tmp_path: Path) -> None:
    config = DoctorConfig(model=model_directory(tmp_path), port=claim_port("127.0.0.1", 0))
    subjects = {finding.subject async for finding in examine(checks_of(config))}
    assert {
        "python",
        "packages",
        "cores",
        "CPU kernels",
        "memory",
        "port",
        "private Redis",
        "model",
        "ucxx",
        "nixl",
        "torch",
    } <= subjects
