"""Cases that schemathesis makes of our OpenAPI document, right ones and wrong ones: none gets a 5xx, none is lost."""

from __future__ import annotations

from collections import Counter

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


BODIES = {"POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize", "POST /detokenize"}
NEEDED = ("messages", "prompt", "tokens")


def is_impossible(deadline: object) -> bool:
    """Whether it may be too soon for this machine: who asks for that gets a 503, which is right."""
    try:
        return 0 < float(str(deadline)) < 600_000
    except ValueError:
        return False


def some_of(body: dict[str, object]) -> st.SearchStrategy[list[str]]:
    """What an order needs, and a few fields more. A whole body is refused for one of fifty fields."""
    needed = [name for name in NEEDED if name in body][:1]
    others = sorted(set(body) - set(NEEDED) - {"model"})
    few = st.lists(st.sampled_from(others), max_size=4, unique=True) if others else st.just([])
    return few.map(lambda chosen: [*needed, *chosen])


def with_ids(value: object) -> object:
    """JSON Schema takes 5.0 for an integer; token ids are written without a point, and ours has some hundred."""
    if isinstance(value, list):
        return [with_ids(each) for each in value]
    return int(value) % 300 if isinstance(value, int | float) and not isinstance(value, bool) else value


@pytest.fixture(scope="module")
def operations(router):
    document = httpx.get(f"{router.base_url}/openapi.json", timeout=60).json()
    return [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]


def ask(router, operations, num_cases: int) -> Counter[tuple[str, int]]:
    """How many cases there were, by operation and status."""
    asked: Counter[tuple[str, int]] = Counter()
    of_deadlines: Counter[int] = Counter()
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
        mode = data.draw(st.sampled_from(list(GenerationMode)))
        case = data.draw(operation.as_strategy(mode))
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = {name: case.body[name] for name in data.draw(some_of(case.body))}
            case.body |= {name: with_ids(case.body[name]) for name in ("prompt", "tokens") if name in case.body}
        for name in DEADLINES:
            if is_impossible(case.headers.get(name)):
                del case.headers[name]
        answer = case.call(base_url=router.base_url, session=session, timeout=60)
        asked[operation.label, answer.status_code] += 1
        of_deadlines[answer.status_code] += any(name in case.headers for name in DEADLINES)
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        if answer.status_code >= 400 and case.method != "HEAD":
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert len(answer.content) < 20_000

    test()
    assert min(of_deadlines[200], of_deadlines[400]) > 0, of_deadlines
    return asked


def test_no_case_of_our_document_is_a_failure_of_ours(router, worker, operations):
    asked = ask(router, operations, 200)
    assert asked.total() >= 200
    assert {operation for operation, _ in asked} >= BODIES
    assert httpx.get(f"{router.base_url}/load", timeout=60).json()["server_load"] == 0


@pytest.mark.slow
@pytest.mark.timeout(14_400)  # of a machine that does other things too; else minutes
def test_no_case_of_ten_thousand_is_a_failure_of_ours(router, worker, operations):
    asked = ask(router, operations, 10_000)
    print("\n".join(f"{num:6} {status} {operation}" for (operation, status), num in asked.most_common()))
    assert asked.total() >= 10_000
    assert {operation for operation, status in asked if status == 200} >= BODIES
    assert httpx.get(f"{router.base_url}/load", timeout=60).json()["server_load"] == 0
