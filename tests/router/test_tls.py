"""The API over TLS, and to whom it speaks where clients need a certificate; all certificates are made on the spot."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from functools import partial
from pathlib import Path

import httpx
import pytest

from services import http_server
from services.http_server import HttpLimits
from services.router import process
from services.router.config import RouterConfig
from services.settings import SettingsError
from tests.router.harness import running_router

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")

BODY = {"prompt": "x", "max_tokens": 1}


def openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)


def make_authority(directory: Path, name: str) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key")
    openssl(directory, "req", "-x509", *key, "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "2")


def make_certificate(directory: Path, name: str, authority: str) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key")
    openssl(directory, "req", "-new", *key, "-out", f"{name}.csr", "-subj", f"/CN={name}")
    (directory / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    signer = ("-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial", "-extfile", "san")
    openssl(directory, "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signer, "-days", "2")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    for authority in ("ours", "theirs"):
        make_authority(directory, authority)
    for name, authority in (("server", "ours"), ("client", "ours"), ("stranger", "theirs")):
        make_certificate(directory, name, authority)
    return directory


def with_tls(pki: Path, **more: object) -> RouterConfig:
    return RouterConfig(
        api_key=("secret",),
        ssl_certfile=str(pki / "server.pem"),
        ssl_keyfile=str(pki / "server.key"),
        **more,  # type: ignore[arg-type]
    )


async def ask(url: str, pki: Path, certificate: str = "") -> int:
    context = ssl.create_default_context(cafile=str(pki / "ours.pem"))
    if certificate:
        context.load_cert_chain(pki / f"{certificate}.pem", pki / f"{certificate}.key")
    headers = {"authorization": "Bearer secret"}
    async with httpx.AsyncClient(verify=context, headers=headers, timeout=60) as http:
        return (await http.post(f"{url}/v1/completions", json=BODY)).status_code


async def test_the_api_speaks_tls_and_nothing_else(make_worker, pki: Path) -> None:
    async with running_router(with_tls(pki), make_worker()) as running:
        url = running.base_url.replace("http:", "https:")
        assert await ask(url, pki) == 200
        async with httpx.AsyncClient(timeout=60) as plain:
            with pytest.raises(httpx.TransportError):
                await plain.get(f"{running.base_url}/health")
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await plain.get(f"{url}/health")


@pytest.mark.parametrize(
    "said", [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], ids=["nothing", "half a hello"]
)
async def test_who_does_not_speak_tls_is_closed(make_worker, pki: Path, monkeypatch, said: bytes) -> None:
    monkeypatch.setattr(http_server, "_HANDSHAKE_S", 0.2)  # of a minute that it is by default
    async with running_router(with_tls(pki), make_worker()) as running, asyncio.timeout(40):
        url = httpx.URL(running.base_url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(said)
        assert await reader.read() == b""
        writer.close()


async def test_who_does_not_answer_the_end_of_tls_is_closed(make_worker, pki: Path, monkeypatch) -> None:
    monkeypatch.setattr(http_server, "_GOODBYE_S", 0.2)  # of half a minute
    monkeypatch.setattr(process, "HttpLimits", partial(HttpLimits, head_timeout_s=0.2))
    async with running_router(with_tls(pki), make_worker()) as running, asyncio.timeout(25):
        url = httpx.URL(running.base_url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = ssl.create_default_context(cafile=str(pki / "ours.pem")).wrap_bio(came, goes, server_hostname=url.host)
        is_through = False
        while not is_through:
            try:
                tls.do_handshake()
                is_through = True
            except ssl.SSLWantReadError:
                pass
            writer.write(goes.read())
            if not is_through:
                came.write(await reader.read(65536))
        await reader.read()  # tickets and the end, which it leaves unanswered
        writer.close()


@pytest.mark.parametrize(("needs", "without"), [(2, None), (1, 200)], ids=["all need one", "those who have one"])
async def test_clients_prove_themselves_by_certificates_of_our_authority(
    make_worker, pki: Path, needs: int, without: int | None
) -> None:
    config = with_tls(pki, ssl_ca_certs=str(pki / "ours.pem"), ssl_cert_reqs=needs)
    async with running_router(config, make_worker()) as running:
        url = running.base_url.replace("http:", "https:")
        assert await ask(url, pki, "client") == 200
        for certificate, status in (("", without), ("stranger", None)):
            if status is not None:
                assert await ask(url, pki, certificate) == status
                continue
            with pytest.raises(httpx.TransportError):  # by TLS 1.3 it hears of it with its first answer
                await ask(url, pki, certificate)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ssl_cert_reqs": 2}, "needs --ssl-ca-certs"),
        ({"ssl_ca_certs": "ca.pem"}, "needs --ssl-certfile"),
        ({"ssl_keyfile": "key.pem"}, "give both"),
    ],
)
def test_settings_that_would_let_everybody_in_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        RouterConfig(**settings)  # type: ignore[arg-type]
