"""Cases that schemathesis makes of our OpenAPI document, right ones and wrong ones: none gets a 5xx, none is lost."""

from __future__ import annotations

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

# Its strategies draw from `random`, and warn of what is their own affair.
pytestmark = pytest.mark.filterwarnings("ignore")


DEADLINES = ("X-Slo-Ttft-Ms", "X-Envoy-Expected-Rq-Timeout-Ms")


@pytest.fixture(scope="module")
def operations(router):
    document = httpx.get(f"{router.base_url}/openapi.json", timeout=60).json()
    return [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]


def ask(router, operations, num_cases: int) -> dict[str, int]:
    """How many cases each operation had."""
    asked = dict.fromkeys((operation.label for operation in operations), 0)
    # The bodies are what there is to get wrong.
    weighed = [operation for operation in operations for _ in range(6 if operation.body else 1)]
    session = requests.Session()

    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def test(data):
        operation = data.draw(st.sampled_from(weighed))
        case = data.draw(operation.as_strategy(data.draw(st.sampled_from(list(GenerationMode)))))
        for name in DEADLINES:  # who asks for the impossible gets a 503, which is right
            case.headers.pop(name, None)
        answer = case.call(base_url=router.base_url, session=session, timeout=60)
        asked[operation.label] += 1
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        if answer.status_code >= 400 and case.method != "HEAD":
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert len(answer.content) < 20_000

    test()
    return asked


def test_no_case_of_our_document_is_a_failure_of_ours(router, worker, operations):
    asked = ask(router, operations, 200)
    assert sum(asked.values()) >= 200
    assert set(asked) >= {"POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize", "POST /detokenize"}
    assert httpx.get(f"{router.base_url}/load", timeout=60).json()["server_load"] == 0


@pytest.mark.slow
@pytest.mark.timeout(14_400)  # of a machine that does other things too; else minutes
def test_no_case_of_ten_thousand_is_a_failure_of_ours(router, worker, operations):
    asked = ask(router, operations, 10_000)
    print("\n".join(f"{num:6} {operation}" for operation, num in asked.items()))
    assert sum(asked.values()) >= 10_000
    assert httpx.get(f"{router.base_url}/load", timeout=60).json()["server_load"] == 0
