"""A registry that is away is not waited for, one that refuses us is an error; a port that is taken is another."""

from __future__ import annotations

import socket

import pytest

from kvstore.errors import RegistryError
from services.startup import CannotListen, check_registry, claim_port


def test_a_registry_that_is_away_keeps_nobody_from_starting(caplog: pytest.LogCaptureFixture) -> None:
    url = f"redis://user:hunter2@127.0.0.1:{claim_port('127.0.0.1', 0)}/0"
    check_registry(url)
    assert "does not answer" in caplog.text
    assert "trying again" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_registry_that_is_there_is_no_news(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    check_registry(redis_url)
    assert caplog.text == ""


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(RegistryError, match="is no URL of a Redis"):
        check_registry("nonsense")


def test_a_taken_port_is_named_with_its_flag() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=rf"127\.0\.0\.1:{port}: .* give another --host or --kv-port"):
            claim_port("127.0.0.1", port, "--kv-port")
