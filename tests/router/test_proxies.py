"""Who a client is behind a proxy: the address in X-Forwarded-For, where somebody trusted says so, else his own."""

from __future__ import annotations

import httpx
import pytest

from services.router.config import RouterConfig
from services.router.edge import serving
from services.settings import SettingsError
from tests.router.harness import running_router

OTHER = "203.0.113.9"
BODY = {"prompt": "x", "max_tokens": 1}


@pytest.mark.parametrize(
    ("trusted", "name"),
    [
        ("127.0.0.1", OTHER),
        ("10.0.0.7, 127.0.0.0/8", OTHER),
        ("*", OTHER),
        ("", "127.0.0.1"),
        ("10.0.0.7", "127.0.0.1"),
    ],
)
async def test_a_client_is_who_a_trusted_proxy_says_and_nobody_else(
    make_worker, monkeypatch, trusted: str, name: str
) -> None:
    names, client_name = [], serving.client_name
    monkeypatch.setattr(serving, "client_name", lambda scope: names.append(client_name(scope)) or names[-1])
    config = RouterConfig(forwarded_allow_ips=trusted)
    async with running_router(config, make_worker()) as running, httpx.AsyncClient(timeout=60) as http:
        url = f"{running.base_url}/v1/completions"
        assert (await http.post(url, json=BODY, headers={"x-forwarded-for": OTHER})).status_code == 200
    assert set(names) == {name}


@pytest.mark.parametrize("trusted", ["localhost", "10.0.0.1/8", "127.0.0.1,", "10.0.0.1 10.0.0.2"])
def test_what_is_no_address_is_refused(trusted: str) -> None:
    with pytest.raises(SettingsError, match="must be addresses and networks"):
        RouterConfig(forwarded_allow_ips=trusted)
