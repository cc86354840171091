"""The process: its settings, its start without a registry, its end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys

import httpx
import pytest
from tandem.v1 import worker_pb2 as pb

from kvstore.registry import Registrar
from services.cli.embedded_redis import EmbeddedRedis
from services.router.config import RouterConfig
from services.settings import SettingsError, argv_of, load_settings, settings_of
from tests.router.fake_worker import Script
from tests.waiting import until
from tests.worker_records import worker_record

NO_REDIS = "redis://127.0.0.1:1/0"


def test_flags_are_spelled_as_vllm_spells_them():
    argv = [
        "--port",
        "9",
        "--api-key",
        "a",
        "b",
        "--served-model-name",
        "m",
        "--root-path",
        "/x",
        "--request-timeout",
        "5",
    ]
    config = load_settings(RouterConfig, argv, prog="router", environ={})
    assert (config.port, config.api_key, config.served_model_name) == (9, ("a", "b"), ("m",))
    assert (config.root_path, config.request_timeout_s) == ("/x", 5.0)
    assert "a" not in argv_of(settings_of(RouterConfig), vars(config))
    from_environment = load_settings(RouterConfig, [], prog="router", environ={"TANDEM_API_KEY": "a,b"})
    assert from_environment.api_key == ("a", "b")


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000}, {"ssl_keyfile": "x"}, {"api_key": ("",)}, {"max_body_bytes": 0}, {"max_attempts": 0},
        {"api_key": ("a,b",)}, {"api_key": (" a",)},
        {"max_queue": -1}, {"sse_keepalive_s": 0.0}, {"request_timeout_s": -1.0}, {"max_concurrent_requests": 0},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(SettingsError) as caught:
        RouterConfig(**wrong)
    assert caught.value.setting == next(iter(wrong))


def test_help_needs_nothing_heavy():
    code = "import sys; from services.router.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('fastapi', 'grpc', 'tokenizers', 'torch', 'redis') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_router_needs_neither_torch_nor_transformers():
    code = "import sys, services.router.process as _; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"


def start(*argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "services.router", "--log-format", "text", *argv]
    environ = {**os.environ, "TANDEM_LAUNCHER": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)


def test_it_answers_without_a_registry_and_ends_on_sigterm():
    with start("--port", "0", "--redis", NO_REDIS) as process:
        try:
            assert process.stderr is not None
            ready = next(line for line in process.stderr if line.startswith("TANDEM-READY"))
            url = json.loads(ready.partition(" ")[2])["url"]
            assert httpx.get(f"{url}/health", timeout=60).status_code == 200
            response = httpx.get(f"{url}/ready", timeout=60)
            assert response.status_code == 503
            assert "retry-after" in response.headers
            assert httpx.get(f"{url}/v1/models", timeout=60).json() == {"object": "list", "data": []}
            body = {"model": "x", "prompt": "x"}
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 503
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 0
        finally:
            process.kill()


async def test_a_stream_that_outlives_the_shutdown_is_cut_with_an_error_and_logged_as_cut(make_worker, sentence):
    worker = make_worker(lambda request: Script([sentence[:2]], pb.FINISH_REASON_UNSPECIFIED), colocated=True)
    await worker.start()
    with EmbeddedRedis.start() as redis:
        registrar = Registrar(redis.url, worker.record(), lease_s=30)
        await registrar.start()
        with start("--port", "0", "--redis", redis.url, "--shutdown-timeout", "0.5") as process:
            try:
                assert process.stderr is not None
                ready = next(line for line in process.stderr if line.startswith("TANDEM-READY"))
                url = json.loads(ready.partition(" ")[2])["url"]
                async with httpx.AsyncClient(base_url=url, timeout=30) as http:
                    while (await http.get("/ready")).status_code != 200:  # noqa: ASYNC110 -- another process's
                        await asyncio.sleep(0.05)
                    body = {"model": "tiny", "prompt": "x", "max_tokens": 9, "stream": True}
                    async with http.stream("POST", "/v1/completions", json=body) as response:
                        lines = response.aiter_lines()
                        await anext(lines)
                        process.send_signal(signal.SIGTERM)
                        rest = [line async for line in lines if line]
                stderr = await asyncio.to_thread(process.stderr.read)
                assert process.wait(timeout=120) == 0
            finally:
                process.kill()
        await registrar.close()
    await worker.stop()
    assert "shutting down" in json.loads(rest[-1].removeprefix("data: "))["error"]["message"]
    assert "Traceback" not in stderr
    assert "1 requests are cut" in stderr
    assert "router_stopping" in stderr


async def test_a_tokenizer_that_cannot_be_read_to_its_end_does_not_keep_the_router_alive(tmp_path, model_directory):
    shutil.copy(model_directory / "tokenizer.json", tmp_path)
    os.mkfifo(tmp_path / "config.json")  # as on a file system that hangs
    record = worker_record(role="decode", model_path=str(tmp_path), tokenizer_path=str(tmp_path))
    with EmbeddedRedis.start() as redis:
        registrar = Registrar(redis.url, record, lease_s=30)
        await registrar.start()
        with start("--port", "0", "--redis", redis.url) as process:
            try:
                assert process.stderr is not None
                ready = next(line for line in process.stderr if line.startswith("TANDEM-READY"))
                url = json.loads(ready.partition(" ")[2])["url"]
                await until(lambda: "is being loaded" in httpx.get(f"{url}/ready", timeout=60).text)
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=120) == 0
            finally:
                process.kill()
        await registrar.close()


def test_certificates_that_are_none_are_refused_before_it_says_that_it_serves(tmp_path):
    (tmp_path / "cert.pem").write_text("none")
    flags = ("--ssl-certfile", str(tmp_path / "cert.pem"), "--ssl-keyfile", str(tmp_path / "key.pem"))
    with start("--port", "0", "--redis", NO_REDIS, *flags) as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert str(tmp_path / "cert.pem") in stderr
    assert "TANDEM-READY" not in stderr
    assert "Traceback" not in stderr


def test_a_registry_url_that_is_none_is_refused():
    with start("--port", "0", "--redis", "nonsense") as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "nonsense" in stderr
    assert "Traceback" not in stderr
