"""Every series that a rule, the dashboard or a scaler asks for is there on a running stack, with its labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.validate.promql import BUILT_IN, queries, recorded, selectors
from tests.stack import Stack

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "services/cli/demo_model/tandem-demo"
PROMPT = "The code of amber is 4711. " + "The code of cedar is 0952. " * 30 + "What is the code of amber?"
# Series of these begin with what one hopes not to see.
EVENT_LABELS = frozenset({"status"})

Labels = dict[str, str]


class Exported:
    """The series of a stack by name, with the labels that Prometheus adds; and the names that have no series yet."""

    def __init__(self) -> None:
        self.series: dict[str, list[Labels]] = {}
        self.names: set[str] = set()

    def add(self, job: str, text: str) -> None:
        for family in text_string_to_metric_families(text):
            self.names |= {family.name, f"{family.name}_total"} if family.type == "counter" else {family.name}
            for sample in family.samples:
                self.add_series(sample.name, {"job": job, "instance": "localhost:1", **sample.labels})

    def add_series(self, name: str, labels: Labels) -> None:
        self.names.add(name)
        self.series.setdefault(name, []).append(labels)

    def complaint(self, selector: promql_parser.VectorSelector) -> str | None:
        """What is wrong with a selector, None if nothing is."""
        name = selector.name or ""
        if name not in self.names and re.sub("_(bucket|sum|count)$", "", name) not in self.names:
            return f"nothing exports {name}"
        found = self.series.get(name)
        if not found:
            return None  # labels come with the first event
        matchers = [matcher for matcher in selector.matchers.matchers if matcher.name not in EVENT_LABELS]
        if not any(all(_matches(matcher, labels) for matcher in matchers) for labels in found):
            return f"no series of {name} has {', '.join(f'{each.name}={each.value!r}' for each in matchers)}"
        return None


def _matches(matcher: promql_parser.Matcher, labels: Labels) -> bool:
    value = labels.get(matcher.name, "")
    if matcher.op in (promql_parser.MatchOp.Equal, promql_parser.MatchOp.NotEqual):
        return (value == matcher.value) == (matcher.op == promql_parser.MatchOp.Equal)
    is_match = re.fullmatch(matcher.value, value) is not None
    return is_match == (matcher.op == promql_parser.MatchOp.Re)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    directory = tmp_path_factory.mktemp("queries")
    store = f"--store-dram-bytes 64MiB --store-disk-dir {directory / 'disk'} --store-disk-bytes 64MiB"
    worker = "--served-model-name tandem-demo --num-gpu-blocks-override 256 --peer-timeout-s 20"
    with Stack(directory / "logs", [""], [""], store=[store], worker=worker, model=DEMO_MODEL) as stack:
        for _ in range(2):
            body = {"model": "tandem-demo", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
        found = Exported()
        for service in stack.services.values():
            found.add(f"tandem-{service.role}", stack.metrics(service.name))
            found.add_series("up", {"job": f"tandem-{service.role}", "instance": "localhost:1"})
        yield found


def test_every_query_asks_for_what_a_running_stack_exports(exported: Exported) -> None:
    made = recorded(ROOT)
    wrong = [
        f"{query.path}: {query.name}: {complaint}"
        for query in queries(ROOT)
        for selector in selectors(query)
        if selector.name not in made and (complaint := exported.complaint(selector))
    ]
    assert wrong == []
    assert {query.path.split("/")[1] for query in queries(ROOT)} == {"monitoring", "kustomize"}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("vllm:num_request_running", "nothing exports"),
        ('vllm:num_requests_running{rol="decode"}', "no series"),
        ('tandem:request_stage_seconds_bucket{stage="handof"}', "no series"),
        ('up{job="tandem-decod"}', "no series"),
    ],
)
def test_a_mistyped_query_is_found(exported: Exported, query: str, message: str) -> None:
    complaint = exported.complaint(promql_parser.parse(query))
    assert complaint is not None
    assert message in complaint


def test_what_prometheus_itself_makes_is_all_that_is_not_ours(exported: Exported) -> None:
    names = {selector.name for query in queries(ROOT) for selector in selectors(query)}
    assert {name for name in names if name and not name.startswith(("vllm:", "tandem:"))} - recorded(ROOT) == BUILT_IN
