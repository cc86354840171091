"""The router's line and count per request: how it ended, not what its head said, and nothing that the client wrote."""

from __future__ import annotations

import json
import logging

import httpx
import pytest
from tandem.v1 import worker_pb2 as pb

from services.router.config import RouterConfig
from services.router.edge.access import AccessRecord
from services.router.errors import invalid
from services.router.metrics import RouterMetrics
from tests.router.fake_worker import Script, failing
from tests.router.harness import running_router, until

COMPLETIONS = "/v1/completions"


def ended(metrics: str) -> dict[tuple[str, str], int]:
    """Requests by endpoint and status."""
    found = {}
    for line in metrics.splitlines():
        if line.startswith("tandem:router_requests_total{"):
            labels, _, value = line.partition("{")[2].rpartition("} ")
            endpoint, status = (part.partition("=")[2].strip('"') for part in labels.split(","))
            found[endpoint, status] = int(float(value))
    return found


async def test_requests_count_by_how_they_ended(make_worker, caplog):
    worker = make_worker()
    caplog.set_level(logging.INFO, "services.router.edge.access")
    async with (
        running_router(RouterConfig(api_key=("secret",)), worker) as running,
        httpx.AsyncClient(base_url=running.base_url, headers={"Authorization": "Bearer secret"}) as http,
    ):
        body = {"prompt": "x", "max_tokens": 3}
        await http.post(COMPLETIONS, json=body, headers={"X-Request-Id": "good"})
        await http.post(COMPLETIONS, json={**body, "temperature": "hot"}, headers={"X-Request-Id": "bad"})
        await http.post(COMPLETIONS, json=body, headers={"Authorization": "Bearer wrong"})
        await http.post("/nowhere", json=body)
        await http.get("/v1/models")
        worker.reply = failing(pb.ERROR_CODE_INTERNAL, "burst", after=[[300]])
        stream = await http.post(COMPLETIONS, json={**body, "stream": True}, headers={"X-Request-Id": "broken"})
        assert stream.status_code == 200, "its head was sent before it broke"
        worker.reply = lambda request: Script([[300]], pb.FINISH_REASON_UNSPECIFIED)
        async with http.stream("POST", COMPLETIONS, json={**body, "stream": True}) as cut:
            await anext(cut.aiter_lines())
        await until(lambda: any(record.status == 499 for record in caplog.records))
        metrics = (await http.get("/metrics")).text
    assert ended(metrics) == {
        (COMPLETIONS, "200"): 1,
        (COMPLETIONS, "400"): 1,
        (COMPLETIONS, "401"): 1,
        (COMPLETIONS, "499"): 1,
        (COMPLETIONS, "500"): 1,
        ("/v1/models", "200"): 1,
        ("other", "404"): 1,
    }
    lines = {record.request_id: record for record in caplog.records}
    good, bad, broken = lines["good"], lines["bad"], lines["broken"]
    assert (good.levelname, good.status, good.prompt_tokens, good.generated_tokens) == ("INFO", 200, 1, 3)
    assert good.decoded_by == worker.record().worker_id
    assert (bad.levelname, bad.status, bad.error) == ("INFO", 400, "invalid_request_error")
    assert (broken.levelname, broken.status) == ("WARNING", 500)
    told = json.dumps([{**vars(record), "args": record.args} for record in caplog.records], default=str)
    assert "hot" not in told
    assert "burst" not in told
    assert "nowhere" not in told


@pytest.mark.parametrize(("status", "is_logged"), [(200, False), (404, False), (500, True)])
def test_without_access_log_only_our_own_failures_are_logged(caplog, status, is_logged):
    caplog.set_level(logging.INFO)
    record = AccessRecord("POST", COMPLETIONS, 0.0, status)
    record.close("r1", RouterMetrics(), is_shown=False, now_s=1.0)
    assert [line.status for line in caplog.records] == [status] * is_logged


def test_probes_are_not_in_the_log(caplog):
    caplog.set_level(logging.INFO)
    record = AccessRecord("GET", "/health", 0.0)
    record.failed(invalid("no"))
    record.close("r1", RouterMetrics(), is_shown=True, now_s=1.0)
    assert caplog.records == []
