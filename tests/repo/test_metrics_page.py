"""docs/metrics.md lists what the tables in the code declare: names, types and labels."""

from __future__ import annotations

import pytest

from services.metric_families import NODE, ROUTER, STORE, WORKER, Table
from tests.metrics_page import documented_series

TABLES: dict[str, tuple[Table, ...]] = {
    "router": (ROUTER,),
    "prefill": (WORKER, NODE),
    "decode": (WORKER, NODE),
    "store": (STORE, NODE),
}
# Of prometheus-client's own making: which build it is.
MADE_ELSEWHERE = {"tandem:build", "tandem:build_info"}


@pytest.mark.parametrize("role", TABLES)
def test_the_page_lists_what_is_declared(role: str) -> None:
    declared = {
        family.name: (
            family.type,
            frozenset(family.labels) - ({"model_name", "role"} if "vllm:" in family.name else set()),
        )
        for table in TABLES[role]
        for family in table.values()
    }
    documented = {
        series.family: (series.type, series.labels - ({"model_name", "role"} if "vllm:" in series.name else set()))
        for series in documented_series()[role]
        if series.family not in MADE_ELSEWHERE
    }
    assert declared == documented


def test_help_is_a_sentence_and_only_histograms_have_buckets() -> None:
    for tables in TABLES.values():
        for family in (family for table in tables for family in table.values()):
            assert family.help.endswith("."), family.name
            assert bool(family.buckets) == (family.type == "histogram"), family.name
            assert list(family.buckets) == sorted(family.buckets), family.name
