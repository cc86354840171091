"""The secrets of a deployment: where they come from, who may read them, and what is derived of them."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from services.decode.config import DecodeConfig
from services.peer_settings import PeerProofs
from services.router.config import RouterConfig
from services.secrets import Secret, make_secret_file, read_secret
from services.settings import SettingsError
from services.store.config import StoreConfig

ONE, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4


def secret_file(directory: Path, content: str | bytes = ONE + "\n", mode: int = 0o600) -> str:
    path = directory / "secret"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return str(path)


def of(text: str) -> Secret:
    secret = read_secret("peer_secret", text, "")
    assert secret is not None
    return secret


def test_a_key_follows_from_secret_and_purpose_and_says_nothing_of_either() -> None:
    assert of(ONE).derive("a") == of(ONE).derive("a")
    keys = {of(text).derive(purpose) for text in (ONE, OTHER) for purpose in ("a", "b", "")}
    assert len(keys) == 6
    assert {len(key) for key in keys} == {32}


def test_the_key_of_today_is_the_key_of_tomorrow() -> None:
    """Blocks on disk are tagged with one: were it to change, an upgrade would lose them."""
    assert of(ONE).derive("kv blocks").hex() == "092d451270e6b91647cd57f4627cbfc0ec9168969fa2e8ffd1d8c9772fdae489"


def test_no_secret_is_shown(tmp_path: Path) -> None:
    for shown in (repr(of(ONE)), str(of(ONE)), repr(DecodeConfig(model="m", peer_secret=ONE, proof_key=ONE))):
        assert ONE not in shown
    with pytest.raises(SettingsError) as error:
        read_secret("peer_secret", ONE[:40], "")
    assert ONE[:40] not in str(error.value)


def test_a_file_and_a_variable_give_the_same(tmp_path: Path) -> None:
    path = secret_file(tmp_path)
    worker = DecodeConfig(model="m", peer_secret_file=path, proof_key_file=path)
    assert worker.read_peer_proofs() == StoreConfig(peer_secret=ONE).read_peer_proofs() != PeerProofs()
    assert worker.read_proof_key() == of(ONE)
    assert RouterConfig(tenant_secret_file=path).read_tenant_secret() == of(ONE)
    assert RouterConfig().read_peer_proofs() == PeerProofs()
    assert RouterConfig().read_tenant_secret() is None


def test_a_second_line_is_accepted_and_not_used(tmp_path: Path) -> None:
    secret = read_secret("peer_secret", "", secret_file(tmp_path, f"{ONE}\n{OTHER}\n"))
    assert secret is not None
    assert secret.derive("a") == of(ONE).derive("a")
    assert secret.derive_all("a") == (of(ONE).derive("a"), of(OTHER).derive("a"))


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o640, 0o660])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    path = secret_file(tmp_path, mode=mode)
    if os.geteuid() == 0:  # whose own files a group may read
        os.chown(path, 1234, 1234)
        monkeypatch.setattr(os, "geteuid", lambda: 1234)
    with pytest.raises(
        SettingsError, match=f"--peer-secret-file {path}: others can read it; chmod 600 {path}"
    ) as error:
        read_secret("peer_secret", "", path)
    assert error.value.setting == "peer_secret_file"


def test_a_file_of_another_user_may_be_read_by_our_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes mounts secrets so."""
    path, owner = secret_file(tmp_path, mode=0o440), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert read_secret("peer_secret", "", path) == of(ONE)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "it is empty"),
        (" \n\n", "it is empty"),
        (ONE[:63], "fewer than 32 random bytes"),
        ("tandem-tandem-tandem-tandem-tandem-tandem-tandem", "fewer than 32 random bytes"),
        ("correct-horse-battery-staple", "fewer than 32 random bytes"),
        (f"{ONE}\nshort", "fewer than 32 random bytes"),
        (b"\xf1\xf2" * 24, "it must be text"),
        (ONE * 65, "no secret"),
    ],
)
def test_what_is_no_secret_is_refused_with_how_to_make_one(tmp_path: Path, content: str | bytes, why: str) -> None:
    with pytest.raises(SettingsError, match=why) as error:
        read_secret("proof_key", "", secret_file(tmp_path, content))
    assert "openssl rand -hex 32" in str(error.value) or "no secret" in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"--tenant-secret-file {tmp_path}/none: No such file"):
        read_secret("tenant_secret", "", str(tmp_path / "none"))


def test_a_file_and_a_variable_at_once_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="which"):
        read_secret("peer_secret", ONE, secret_file(tmp_path))


def test_a_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "peer"
    starting = [threading.Thread(target=make_secret_file, args=(path,)) for _ in range(8)]
    for thread in starting:
        thread.start()
    for thread in starting:
        thread.join()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    made = path.read_text()
    make_secret_file(path)
    assert path.read_text() == made
    assert read_secret("peer_secret", "", str(path)) is not None
    assert os.listdir(path.parent) == ["peer"]
