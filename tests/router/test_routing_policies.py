"""The policies as functions of a snapshot: what they prefer, and that they depend on nothing else."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import hash_blocks, namespace
from services.rates import Rates
from services.router.routing import (
    CostModel,
    Decision,
    DecodeCandidate,
    Held,
    KnownPrefix,
    Policy,
    PolicyState,
    PrefillCandidate,
    RecentPrefixes,
    Refusal,
    RoutedRequest,
    is_alike,
    next_state,
)
from tests.router.choosing import choose

BLOCK = 32
COST = CostModel()


def decode(worker_id, num_outstanding=0, **fields) -> DecodeCandidate:
    defaults = {"model_names": ("m",), "model_fingerprint": "f", "connected": True, "draining": False}
    sizes = {"max_num_seqs": 8, "num_blocks": 1000, "num_free_blocks": 1000}
    return DecodeCandidate(worker_id, "1", num_outstanding=num_outstanding, **{**defaults, **sizes, **fields})


def prefill(worker_id, num_tokens=0, **fields) -> PrefillCandidate:
    defaults = {"model_names": ("m",), "model_fingerprint": "f", "draining": False}
    return PrefillCandidate(
        worker_id, "1", "host:1", "host:2", num_outstanding_tokens=num_tokens, **{**defaults, **fields}
    )


def request(num_tokens=1500, held=None, expected=None, key=b"key") -> RoutedRequest:
    prefix = KnownPrefix(BLOCK, num_tokens // BLOCK, held or {}, expected or {})
    return RoutedRequest("m", num_tokens, key, {"f": prefix})


def on_device(num_blocks: int) -> Held:
    return Held(num_blocks, (num_blocks, 0, 0, 0))


def on_disk(num_blocks: int) -> Held:
    return Held(num_blocks, (0, 0, 0, num_blocks))


def chosen(asked, decodes, prefills=(), **options) -> Decision:
    decision = choose(asked, decodes, prefills, **options)
    assert isinstance(decision, Decision)
    return decision


# ---- kv ---------------------------------------------------------------------------


@given(
    num_tokens=st.integers(100, 4000),
    share=st.floats(0.1, 1),
    queue=st.integers(0, 20_000),
    key=st.binary(max_size=4),
)
def test_the_worker_with_the_prefix_is_preferred_unless_its_queue_costs_more(num_tokens, share, queue, key):
    num_held = max(int(num_tokens // BLOCK * share), 1)
    # No fetch pays, so that the other worker would have to compute it all; and all tokens of a prompt cost the same.
    cost = CostModel(Rates(fetch_device_s=1.0, prompt_pair_s=0.0))
    asked = request(num_tokens, {"holder": on_device(num_held)}, key=key)
    decision = chosen(asked, [decode("d")], [prefill("holder", queue), prefill("other")], cost=cost)
    saved = (num_tokens - max(num_tokens - num_held * BLOCK, 1)) * cost.new_work_weight
    if queue != saved:
        assert decision.prefill[0].worker_id == ("holder" if queue < saved else "other")


def test_a_hit_that_others_can_fetch_is_worth_only_what_the_fetch_costs():
    asked = request(1500, {"holder": on_device(46)})
    decision = chosen(asked, [decode("d")], [prefill("holder", 600), prefill("other")])
    terms = decision.prefilled_by
    assert (terms.worker_id, terms.fetched_from, terms.num_fetched_blocks) == ("other", "holder", 46)
    assert terms.num_computed_tokens == 1500 - 46 * BLOCK
    assert decision.sources == ("holder",)


def test_a_fetch_from_a_slow_tier_does_not_pay_where_computing_is_faster():
    fast = CostModel(Rates(prompt_token_s=1e-5, prompt_pair_s=0.0))
    asked = request(1500, {"store": on_disk(46)})
    decision = chosen(asked, [decode("d")], [prefill("p")], cost=fast)
    assert (decision.prefilled_by.fetched_from, decision.sources) == ("", ("store",))  # the worker decides in the end
    assert chosen(asked, [decode("d")], [prefill("p")]).prefilled_by.fetched_from == "store"


def test_the_faster_tier_is_the_better_source():
    held = {"disk": on_disk(40), "device": on_device(40), "short": on_device(2)}
    decision = chosen(request(1500, held), [decode("d")], [prefill("p")])
    assert decision.prefilled_by.fetched_from == "device"
    assert decision.sources == ("device", "disk", "short")


def test_a_decode_worker_that_lacks_next_to_nothing_prefills_by_itself():
    asked = request(64 + 10, {"d-1": on_device(2)})
    busy = decode("d-1", 2, local_prefill_max_tokens=10)
    decision = chosen(asked, [busy, decode("d-2", local_prefill_max_tokens=10)], [prefill("p")])
    assert decision.decode.worker_id == "d-1"
    assert decision.prefills_locally
    assert decision.prefilled_by.num_computed_tokens == 10
    assert [target.worker_id for target in decision.prefill] == ["p"]  # should it be wrong


@pytest.mark.parametrize(("max_tokens", "is_local"), [(0, False), (9, False), (10, True), (500, True)])
def test_the_router_expects_a_local_prefill_by_the_worker_s_own_setting_and_no_constant(max_tokens, is_local):
    asked = request(64 + 10, {"d": on_device(2)})
    decision = chosen(asked, [decode("d", local_prefill_max_tokens=max_tokens)], [prefill("p")])
    assert decision.prefills_locally == is_local


def test_without_prefill_workers_and_when_colocated_the_decode_worker_s_own_queue_counts():
    idle, busy = decode("idle"), decode("busy", num_waiting_tokens=10_000)
    assert chosen(request(), [busy, idle]).decode.worker_id == "idle"
    colocated = [dataclasses.replace(worker, colocated=True) for worker in (busy, idle)]
    decision = chosen(request(), colocated, [prefill("p")])
    assert (decision.decode.worker_id, decision.prefills_locally) == ("idle", True)


def test_a_decode_worker_without_room_or_with_a_full_batch_is_passed_over():
    full_pool = decode("a", num_free_blocks=10)
    full_batch = decode("b", 8)
    assert chosen(request(), [full_pool, full_batch, decode("c", 6)], [prefill("p")]).decode.worker_id == "c"


def test_equal_workers_are_told_apart_by_the_prompt_s_beginning():
    prefills = [prefill(name) for name in "abcd"]
    picks = {key: chosen(request(key=bytes([key])), [decode("d")], prefills).prefill[0].worker_id for key in range(200)}
    assert set(picks.values()) == set("abcd")
    again = {key: chosen(request(key=bytes([key])), [decode("d")], prefills[:3]).prefill[0].worker_id for key in picks}
    assert all(again[key] == worker for key, worker in picks.items() if worker != "d")


@pytest.mark.parametrize("num_tokens", [1500, 1535, 4000])
def test_identical_cold_prompts_in_a_burst_all_go_to_one_prefill_worker(num_tokens):
    """As the router does it: each decision's work is counted and its prefix remembered before the next one."""
    hashes = hash_blocks(namespace("f"), list(range(num_tokens)), BLOCK)
    recent, queued, picks = RecentPrefixes(), dict.fromkeys("abcd", 0), []
    for number in range(32):
        expected = {key[0]: count for key, count in recent.num_held(hashes, float(number)).items()}
        prefills = [prefill(name, tokens) for name, tokens in queued.items()]
        decodes = [decode(f"d{i}", (number + i) // 2, max_num_seqs=64) for i in range(2)]
        decision = chosen(request(num_tokens, expected=expected), decodes, prefills)
        picks.append(decision.prefill[0].worker_id)
        queued[picks[-1]] += decision.prefilled_by.num_computed_tokens
        recent.add((picks[-1], "1"), hashes, float(number))
    assert len(set(picks)) == 1
    assert sum(queued.values()) < 2 * num_tokens  # computed once, but for each one's last, partial block


def test_different_cold_prompts_spread():
    queued = dict.fromkeys("abcd", 0)
    for number in range(40):
        prefills = [prefill(name, tokens) for name, tokens in queued.items()]
        decision = chosen(request(key=bytes([number])), [decode("d")], prefills)
        queued[decision.prefill[0].worker_id] += decision.prefilled_by.num_computed_tokens
    assert set(queued.values()) == {10 * 1500}


# ---- the others ---------------------------------------------------------------------


def test_round_robin_is_fair_whoever_comes_and_goes():
    state, decode_picks, prefill_picks = PolicyState(), [], []
    decodes, prefills = [decode(name) for name in "abc"], [prefill(name) for name in "xy"]
    for _ in range(60):
        decision = chosen(request(), decodes, prefills, policy=Policy.ROUND_ROBIN, state=state)
        decode_picks.append(decision.decode.worker_id)
        prefill_picks.append(decision.prefill[0].worker_id)
        state = next_state(state, decision, set("abcxy"))
    assert [decode_picks.count(name) for name in "abc"] == [20, 20, 20]
    assert [prefill_picks.count(name) for name in "xy"] == [30, 30]
    assert all(len(set(decode_picks[i : i + 3])) == 3 for i in range(0, 60, 3))
    joined = chosen(request(), [*decodes, decode("new")], prefills, policy=Policy.ROUND_ROBIN, state=state)
    assert joined.decode.worker_id == "new"
    assert set(next_state(state, joined, {"new", "x", "y"}).last_turn) <= {"new", "x", "y"}


def test_only_round_robin_keeps_state():
    decision = chosen(request(), [decode("a")], policy=Policy.KV)
    state = PolicyState({"a": 3})
    assert next_state(state, decision, {"a"}) is state


def test_least_loaded_does_not_look_at_prefixes():
    asked = request(1500, {"a": on_device(46), "x": on_device(46)})
    decision = chosen(asked, [decode("a", 1), decode("b")], [prefill("x", 1), prefill("y")], policy=Policy.LEAST_LOADED)
    assert (decision.decode.worker_id, decision.prefill[0].worker_id) == ("b", "y")


def test_prefix_hash_stays_until_a_worker_has_far_more_than_the_mean():
    names = "abc"
    prefills, decodes = [prefill(name) for name in names], [decode(name) for name in names]
    first = chosen(request(), decodes, prefills, policy=Policy.PREFIX_HASH)
    home = first.prefill[0].worker_id

    def pick(tokens: int) -> str:
        loaded = [prefill(name, tokens if name == home else 0) for name in names]
        return chosen(request(), decodes, loaded, policy=Policy.PREFIX_HASH).prefill[0].worker_id

    assert pick(4096) == home
    assert pick(20_000) != home
    crowded = [decode(name, 20 if name == first.decode.worker_id else 0) for name in names]
    assert chosen(request(), crowded, prefills, policy=Policy.PREFIX_HASH).decode.worker_id != first.decode.worker_id


# ---- all ----------------------------------------------------------------------------

names = st.sampled_from([f"w{i}" for i in range(6)])
held_blocks = st.tuples(*[st.integers(0, 20)] * 4).map(lambda tiers: Held(sum(tiers), tiers))
decodes_of = st.lists(
    st.builds(
        decode,
        names,
        st.integers(0, 20),
        num_waiting_tokens=st.integers(0, 5000),
        num_free_blocks=st.integers(0, 1000),
        connected=st.booleans(),
        draining=st.booleans(),
        colocated=st.booleans(),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda worker: worker.worker_id,
)
prefills_of = st.lists(
    st.builds(prefill, names.map(lambda name: "p" + name), st.integers(0, 5000), draining=st.booleans()),
    max_size=6,
    unique_by=lambda worker: worker.worker_id,
)
requests_of = st.builds(
    request,
    st.integers(1, 3000),
    st.dictionaries(
        st.sampled_from([*(f"w{i}" for i in range(3)), *(f"pw{i}" for i in range(3)), "store"]), held_blocks
    ),
    st.dictionaries(st.sampled_from(["w0", "pw0", "pw1"]), st.integers(0, 90)),
    st.binary(max_size=2),
)
states_of = st.builds(PolicyState, st.dictionaries(names, st.integers(1, 50)))


@settings(max_examples=300)
@given(
    asked=requests_of,
    decodes=decodes_of,
    prefills=prefills_of,
    policy=st.sampled_from(list(Policy)),
    state=states_of,
    exclude=st.sets(names),
    seed=st.integers(0, 1000),
)
def test_the_decision_depends_on_the_snapshot_alone_and_never_takes_the_dead_or_draining(
    asked, decodes, prefills, policy, state, exclude, seed
):
    decision = choose(asked, decodes, prefills, exclude, policy=policy, state=state)
    shuffle = random.Random(seed)
    reordered = (shuffle.sample(decodes, len(decodes)), shuffle.sample(prefills, len(prefills)))
    prefix = asked.prefixes["f"]
    items = list(prefix.held.items())
    shuffle.shuffle(items)
    asked_again = dataclasses.replace(asked, prefixes={"f": dataclasses.replace(prefix, held=dict(items))})
    assert choose(asked_again, *reordered, exclude, policy=policy, state=state) == decision
    if not isinstance(decision, Decision):
        return
    assert decision.decode.connected
    assert not decision.decode.draining
    assert decision.decode.worker_id not in exclude
    assert not any(worker.draining for worker in decision.prefill)
    # Every candidate is accounted for, and the expectation is of one that was chosen.
    assert {terms.worker_id for terms in decision.prefill_terms} == {
        worker.worker_id for worker in prefills if not worker.draining
    }
    assert decision.prefilled_by.worker_id in {decision.decode.worker_id, *(w.worker_id for w in decision.prefill[:1])}
    assert 1 <= decision.prefilled_by.num_computed_tokens <= asked.num_prompt_tokens
    assert decision.prefilled_by.worker_id not in decision.sources
    if policy is Policy.KV:
        assert decision.decode_terms[0].total == min(terms.total for terms in decision.decode_terms)


# ---- why, in one word ---------------------------------------------------------------


def test_a_decision_says_in_one_word_what_decided():
    two = [decode("d1"), decode("d2")]
    holder, other = prefill("p1"), prefill("p2")
    assert chosen(request(), [decode("d1")], [holder]).cause == "only"
    assert chosen(request(), two, [holder, other]).cause == "load"
    assert chosen(request(held={"p1": on_device(40)}), two, [holder, other]).cause == "prefix"
    assert chosen(request(held={"s1": on_device(40)}), two, [holder, other]).cause == "fetch"
    words = {Policy.LEAST_LOADED: "load", Policy.ROUND_ROBIN: "turn", Policy.PREFIX_HASH: "hash"}
    for policy, word in words.items():
        assert chosen(request(held={"p1": on_device(40)}), two, [holder, other], policy=policy).cause == word


@pytest.mark.parametrize("policy", Policy)
def test_what_was_begun_goes_on_where_it_is_computed_alike_however_busy_that_is(policy):
    begun = dataclasses.replace(request(), numerics="a/bf16")
    unlike, nameless = decode("unlike", numerics="b/bf16"), decode("nameless")
    alike = decode("alike", 500, numerics="a/bf16", num_free_blocks=0)
    for others in ([unlike], [nameless], [unlike, nameless]):
        assert chosen(begun, [*others, alike], policy=policy).decode is alike
        assert chosen(begun, [*others, alike], exclude={"alike"}, policy=policy).decode in others
    # A new request has no such wish.
    assert chosen(request(), [unlike, alike], policy=Policy.LEAST_LOADED).decode is unlike


def test_nobody_gets_more_than_its_context_holds_but_what_has_begun_and_has_no_better_place():
    asked = dataclasses.replace(request(100), num_final_tokens=200)
    long, short, busy = decode("a", max_model_len=200), decode("b", max_model_len=199), decode("c", 7)
    assert chosen(asked, [short, long, busy]).decode is long
    assert chosen(asked, [short, busy]).decode is busy, "its context is not known"
    assert choose(asked, [short], []) is Refusal.TOO_SHORT
    begun = dataclasses.replace(asked, has_begun=True)
    assert chosen(begun, [short, busy]).decode is busy
    assert chosen(begun, [short]).decode is short
    assert chosen(begun, [decode("d", max_model_len=101)]).decode.worker_id == "d"
    assert choose(begun, [decode("d", max_model_len=100)], []) is Refusal.TOO_SHORT
    drains = dataclasses.replace(long, draining=True)
    assert chosen(begun, [short, drains]).decode is short


def test_a_prompt_is_ordered_where_one_token_more_than_its_first_finds_room():
    asked = dataclasses.replace(request(100), num_final_tokens=200)
    targets = [prefill("p1", max_model_len=101), prefill("p2", 9, max_model_len=102), prefill("p3", 99)]
    assert [each.worker_id for each in chosen(asked, [decode("d")], targets).prefill] == ["p2", "p3"]
    last = dataclasses.replace(asked, num_final_tokens=101)
    assert [each.worker_id for each in chosen(last, [decode("d")], targets).prefill] == ["p1", "p2", "p3"]


def test_alike_are_equal_names_alone():
    assert is_alike("a/bf16", "a/bf16", "a/bf16")
    assert not is_alike("a/bf16", "a/bf16", "b/bf16")
    assert not is_alike("", "")
    assert not is_alike("a/bf16", "")
