"""Who gets another prompt now: workers with a moment's work in front and a place in their batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from services.rates import Rates
from services.router.fleet import Headroom
from services.router.routing import DecodeCandidate, DecodeTable, PrefillCandidate, PrefillTable

RATES = Rates(base_s=0.01, prompt_token_s=1e-3, prompt_pair_s=1e-12, num_steps=100)


def decode(name: str, num_outstanding: int = 0, **facts: object) -> DecodeCandidate:
    usual: dict[str, object] = {"connected": True, "draining": False, "max_num_seqs": 8, "num_waiting_tokens": 0}
    return DecodeCandidate(
        name,
        "1",
        ("m",),
        "ab12",
        num_outstanding=num_outstanding,
        **usual | facts,  # type: ignore[arg-type]
    )


def prefill(name: str, num_tokens: int, draining: bool = False) -> PrefillCandidate:
    return PrefillCandidate(name, "1", "", "", ("m",), "ab12", draining, num_tokens)


@dataclass
class StillWorkers:
    """As the router's `Workers`, at one moment."""

    decodes: list[DecodeCandidate] = field(default_factory=list)
    prefills: list[PrefillCandidate] = field(default_factory=list)

    def decode_table(self) -> DecodeTable:
        return DecodeTable(self.decodes)

    def prefill_table(self) -> PrefillTable:
        return PrefillTable(self.prefills)

    def fingerprint(self, model: str) -> str:
        return "ab12"

    def rates(self, fingerprint: str) -> Rates:
        assert fingerprint == "ab12"
        return RATES


@pytest.mark.parametrize(
    ("decodes", "prefills", "pending", "has_room"),
    [
        ([], [], (0, 0), True),  # nobody is ready: not for us to say
        ([decode("d", connected=False)], [], (0, 0), True),
        ([decode("d")], [prefill("p", 400)], (0, 0), True),
        ([decode("d")], [prefill("p", 600)], (0, 0), False),
        ([decode("d")], [prefill("p", 400)], (1, 200), False),  # granted a moment ago
        ([decode("d")], [prefill("p", 600), prefill("q", 0)], (0, 0), True),
        ([decode("d")], [prefill("p", 600), prefill("q", 0, draining=True)], (0, 0), False),
        ([decode("d", 10)], [prefill("p", 0)], (0, 0), True),
        ([decode("d", 11)], [prefill("p", 0)], (0, 0), False),  # a batch of 8, an eighth and two
        ([decode("d", 10)], [prefill("p", 0)], (1, 0), False),
        ([decode("d", 11), decode("e")], [prefill("p", 0)], (0, 0), True),
        ([decode("d", 1000, max_num_seqs=0)], [prefill("p", 0)], (0, 0), True),
        ([decode("d", colocated=True, num_waiting_tokens=600)], [], (0, 0), False),
        ([decode("d", num_waiting_tokens=600)], [], (0, 0), False),  # no prefill worker: it computes all by itself
        ([decode("d", num_waiting_tokens=600)], [prefill("p", 0)], (0, 0), True),
    ],
)
def test_a_worker_gets_what_keeps_it_busy_and_the_rest_waits(decodes, prefills, pending, has_room) -> None:
    headroom = Headroom(StillWorkers(decodes, prefills), backlog_s=0.5)  # type: ignore[arg-type]
    assert headroom.has_room("m", *pending) == has_room


def test_what_is_in_front_is_that_of_the_worker_with_fewest() -> None:
    headroom = Headroom(StillWorkers([decode("d")], [prefill("p", 700), prefill("q", 300)]), 0.5)  # type: ignore[arg-type]
    assert (headroom.front_tokens("m"), headroom.num_prefilling("m")) == (300, 2)
    assert (headroom.front_tokens("other"), headroom.num_prefilling("other")) == (0, 1)


def test_without_a_bound_workers_get_all_there_is() -> None:
    headroom = Headroom(StillWorkers([decode("d")], [prefill("p", 10**6)]), 0.0)  # type: ignore[arg-type]
    assert headroom.has_room("m", 0, 10**6)
