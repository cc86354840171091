"""No route is open by mistake, whatever prefix a proxy puts before it; and browsers can read every refusal."""

from __future__ import annotations

import httpx
import pytest
from starlette.routing import Route

from services.router.app import generating_endpoints, make_api
from services.router.config import PUBLIC_ROUTES, RouterConfig
from services.settings import SettingsError
from tests.router.harness import running_router, until
from tests.router.test_access import ended

KEY = {"authorization": "Bearer secret"}
OPEN = ("/health", "/ready")
OPENED = (
    "/metrics",
    "/load",
    "/version",
    "/openapi.json",
    "/debug/controller",
    "/debug/workers",
    "/debug/routing/mine",
)
ORIGIN = "https://chat.example"


def routes_of(parts) -> list[tuple[str, str]]:
    """Method and path of every route, with something in its parameters."""
    return [("POST", path) for path in generating_endpoints(parts)] + [
        (method, route.path.replace("{name:path}", "tiny").replace("{request_id:path}", "mine"))
        for route in make_api(parts).routes
        if isinstance(route, Route)
        for method in sorted(route.methods or ())
    ]


@pytest.mark.parametrize("public", [(), PUBLIC_ROUTES], ids=["by default", "as configured"])
@pytest.mark.parametrize("root_path", ["", "/x", "/x/", "/v1", "/v1/models", "/health"])
async def test_no_route_is_open_by_a_prefix(make_worker, root_path, public):
    config = RouterConfig(api_key=("secret",), root_path=root_path, public_routes=public)
    is_open = {*OPEN, *(OPENED if public else ())}
    async with (
        running_router(config, make_worker()) as running,
        httpx.AsyncClient(base_url=running.base_url, timeout=60) as http,
    ):
        routes = routes_of(running.parts)
        assert len(routes) >= 14
        assert ("GET", "/v1/models/tiny") in routes
        for method, path in routes:
            for prefix in {"", root_path.rstrip("/")}:  # the proxy strips it, or does not
                answers = [await http.request(method, prefix + path, headers=headers) for headers in
                           ({}, {"authorization": "Bearer wrong"}, KEY)]  # fmt: skip
                statuses = [answer.status_code for answer in answers]
                if path in is_open:  # 503: not ready without a prefill worker; 404: no such decision
                    assert set(statuses) <= {200, 404, 503}, (prefix, path)
                else:
                    assert statuses[:2] == [401, 401], (prefix, path)
                    assert statuses[2] in (200, 400, 404), (prefix, path, answers[2].text)
                    assert "unknown_url" not in answers[2].text, (prefix, path)


@pytest.mark.parametrize(
    "path",
    ["/nowhere", "//v1/models", "/V1/models", "/v1/models/", "/health/", "/health/../v1/models", "/metrics/x",
     "/%76%31/models", "/v1%2fmodels", "/x/x/v1/models", "/x/nowhere", "/x", "/", "/x/health/v1/models"],
)  # fmt: skip
async def test_no_spelling_of_a_path_is_open(make_worker, path):
    async with running_router(RouterConfig(api_key=("secret",), root_path="/x"), make_worker()) as running:
        url = httpx.URL(running.base_url).copy_with(raw_path=path.encode())
        async with httpx.AsyncClient(timeout=60) as http:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
                assert (await http.request(method, url)).status_code == 401


async def test_a_prefix_hides_no_tenant_and_no_endpoint(make_worker):
    worker = make_worker()
    async with (
        running_router(RouterConfig(api_key=("acme:secret",), root_path="/x"), worker) as running,
        httpx.AsyncClient(base_url=running.base_url, headers=KEY, timeout=60) as http,
    ):
        for prefix in ("", "/x"):
            answer = await http.post(f"{prefix}/v1/completions", json={"prompt": "x", "max_tokens": 1})
            assert answer.status_code == 200
        metrics = (await http.get("/x/metrics")).text
        assert (await http.get("/x/metrics", headers={"authorization": ""})).status_code == 401
    salts = {request.cache_salt for request in worker.requests}
    assert len(salts) == 1
    assert "" not in salts
    assert ended(metrics) == {("/v1/completions", "200"): 2}


def test_a_prefix_without_a_slash_is_refused():
    with pytest.raises(SettingsError, match="slash"):
        RouterConfig(root_path="x")


async def test_browsers_can_read_refusals_and_crashes(make_worker):
    config = RouterConfig(api_key=("secret",), allowed_origins=(ORIGIN,))
    worker = make_worker()
    async with (
        running_router(config, worker) as running,
        httpx.AsyncClient(base_url=running.base_url, headers={"origin": ORIGIN}, timeout=60) as http,
    ):
        running.parts.metrics.exposition = lambda: 1 / 0
        running.parts.placer.log.find = lambda *args: 1 / 0
        await until(lambda: running.parts.workers.num_sessions_up == 1)
        body = {"prompt": "x", "max_tokens": 1}
        answers = [
            await http.post("/v1/completions", json=body),
            await http.get("/v1/models"),
            await http.get("/metrics", headers=KEY),
            await http.get("/debug/routing/x", headers=KEY),
            await http.get("/nowhere", headers=KEY),
            await http.post("/v1/completions", json={}, headers=KEY),
            await http.post("/v1/completions", json=body, headers=KEY),
        ]
    assert [answer.status_code for answer in answers] == [401, 401, 500, 500, 404, 400, 200]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["x-request-id"]


async def test_an_error_has_one_content_type(make_worker):
    async with (
        running_router(RouterConfig(api_key=("secret",)), make_worker()) as running,
        httpx.AsyncClient(base_url=running.base_url, timeout=60) as http,
    ):
        refusals = [await http.get("/v1/models"), await http.post("/v1/completions", json={}, headers=KEY),
                    await http.post("/tokenize", json={}, headers=KEY)]  # fmt: skip
    assert [answer.headers.get_list("content-type") for answer in refusals] == [["application/json"]] * 3
    assert refusals[0].headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("keys", [("a", "a"), ("acme:a", "other:a"), ("acme:a", "a")])
def test_a_key_of_two_tenants_is_refused_at_start(keys):
    with pytest.raises(SettingsError, match="twice"):
        RouterConfig(api_key=keys)


async def test_a_request_id_with_slashes_can_be_explained(make_worker):
    async with (
        running_router(RouterConfig(), make_worker()) as running,
        httpx.AsyncClient(base_url=running.base_url, timeout=60) as http,
    ):
        await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "request_id": "a/b"})
        assert (await http.get("/debug/routing/a/b")).json()["request_id"] == "a/b"
