"""The choice of workers, as a function of what is known."""

from __future__ import annotations

import pytest

from services.router.fleet import routing_key
from services.router.routing import (
    Decision,
    DecodeCandidate,
    PrefillCandidate,
    Refusal,
    RoutedRequest,
)
from tests.router.choosing import choose

REQUEST = RoutedRequest("m", num_prompt_tokens=100, key=b"key")


def decode(worker_id, num_outstanding=0, *, models=("m",), connected=True, draining=False, fingerprint="f"):
    return DecodeCandidate(worker_id, "1", models, fingerprint, connected, draining, num_outstanding)


def prefill(worker_id, num_tokens=0, *, models=("m",), draining=False, fingerprint="f"):
    return PrefillCandidate(worker_id, "1", "host:1", "host:2", models, fingerprint, draining, num_tokens)


def chosen(decodes, prefills=(), **options) -> Decision:
    decision = choose(REQUEST, decodes, prefills, **options)
    assert isinstance(decision, Decision)
    return decision


def test_takes_the_decode_worker_with_the_least_in_front():
    decision = chosen([decode("a", 3), decode("b", 1), decode("c", 2)])
    assert decision.decode.worker_id == "b"
    assert "b has 1 requests" in decision.reason


def test_passes_over_other_models_draining_unconnected_and_tried_workers():
    candidates = [
        decode("other", models=("x",)),
        decode("draining", draining=True),
        decode("away", connected=False),
        decode("tried"),
        decode("busy", 100),
    ]
    assert chosen(candidates, exclude=["tried"]).decode.worker_id == "busy"


@pytest.mark.parametrize(
    ("candidates", "exclude", "refusal"),
    [
        ([], [], Refusal.NO_WORKER),
        ([decode("a", models=("x",))], [], Refusal.NO_WORKER),
        ([decode("a", connected=False)], [], Refusal.NOT_CONNECTED),
        ([decode("a", draining=True)], [], Refusal.DRAINING),
        ([decode("a"), decode("b")], ["a", "b"], Refusal.ALL_TRIED),
    ],
)
def test_says_why_there_is_none(candidates, exclude, refusal):
    assert choose(REQUEST, candidates, [], exclude) is refusal


def test_orders_prefill_workers_by_their_prompt_tokens_and_takes_three():
    targets = [prefill("a", 500), prefill("b", 0), prefill("c", 200), prefill("d", 900)]
    assert [worker.worker_id for worker in chosen([decode("x")], targets).prefill] == ["b", "c", "a"]


def test_takes_prefill_workers_of_the_same_weights_only():
    targets = [prefill("other", fingerprint="g"), prefill("draining", draining=True), prefill("x", models=("n",))]
    assert chosen([decode("d")], targets).prefill == ()


def test_ties_are_stable_and_spread_over_the_workers():
    candidates = [decode(name) for name in "abcd"]

    def pick(key: bytes, among) -> str:
        decision = choose(RoutedRequest("m", 10, key), among, [])
        assert isinstance(decision, Decision)
        return decision.decode.worker_id

    keys = [bytes([i]) for i in range(200)]
    picks = {key: pick(key, candidates) for key in keys}
    assert picks == {key: pick(key, candidates[::-1]) for key in keys}
    assert set(picks.values()) == set("abcd")
    # A worker that leaves moves its own requests only.
    without_d = {key: pick(key, candidates[:3]) for key in keys}
    assert all(without_d[key] == worker for key, worker in picks.items() if worker != "d")


def test_prompts_that_begin_equally_have_the_same_key():
    head = list(range(256))
    assert routing_key([*head, 1], "") == routing_key([*head, 2, 3], "")
    assert routing_key(head, "") != routing_key(head, "salt")
    assert routing_key([12, 3], "") != routing_key([1, 23], "")
