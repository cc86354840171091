"""The memory of what was just sent where: bounded, aged, and equal to a dumb model while it is young and small."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import BlockHash, hash_blocks, namespace
from services.router.routing import RecentPrefixes

A, B = ("a", "1"), ("b", "1")


def chain(num_blocks: int, salt: str = "") -> list[BlockHash]:
    return hash_blocks(namespace("f", salt), list(range(num_blocks * 4)), 4)


def test_tells_how_much_of_a_prompt_each_worker_was_sent():
    recent = RecentPrefixes()
    hashes = chain(10)
    recent.add(A, hashes[:7], 0.0)
    recent.add(B, hashes[:3], 1.0)
    assert recent.num_held(hashes, 2.0) == {A: 7, B: 3}
    assert recent.num_held(hashes[:2], 2.0) == {A: 2, B: 2}
    assert recent.num_held(chain(10, "another tenant"), 2.0) == {}
    recent.forget(A, hashes[:7])
    assert recent.num_held(hashes, 2.0) == {B: 3}


def test_forgets_with_age():
    recent = RecentPrefixes()
    hashes = chain(4)
    recent.add(A, hashes, 0.0)
    recent.add(B, hashes[:2], 20.0)
    assert recent.num_held(hashes, 30.0) == {A: 4, B: 2}
    assert recent.num_held(hashes, 31.0) == {B: 2}
    assert recent.num_held(hashes, 51.0) == {}
    assert len(recent) == 0


def test_is_bounded_and_drops_the_ends_of_old_chains_first(monkeypatch):
    monkeypatch.setattr("services.router.routing.recent._MAX_BLOCKS", 10)
    recent = RecentPrefixes()
    old, new = chain(6, "old"), chain(6, "new")
    recent.add(A, old, 0.0)
    recent.add(A, new, 1.0)
    assert len(recent) == 10
    assert recent.num_held(new, 1.0) == {A: 6}
    assert recent.num_held(old, 1.0) == {A: 4}


def test_a_prefix_that_everybody_sends_does_not_remember_every_worker_there_ever_was():
    recent, hashes = RecentPrefixes(), chain(2)
    for incarnation in range(1000):
        recent.add(("w", str(incarnation)), hashes, float(incarnation))
    assert len(recent.num_held(hashes, 999.0)) == 31
    assert max(map(len, recent._sent.values())) < 40


steps = st.lists(
    st.tuples(st.booleans(), st.sampled_from([A, B]), st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=30
)


@given(steps)
def test_agrees_with_a_set_per_worker(steps):
    chains = [chain(6, str(salt)) for salt in range(3)]
    recent, dumb = RecentPrefixes(), {A: set(), B: set()}
    for now_s, (adds, worker, which, length) in enumerate(steps):
        hashes = chains[which][:length]
        if adds:
            recent.add(worker, hashes, float(now_s) / 100)
            dumb[worker] |= set(hashes)
        else:
            recent.forget(worker, hashes)
            dumb[worker] -= set(hashes)
        for asked in chains:
            held = {w: next((i for i, h in enumerate(asked) if h not in there), 6) for w, there in dumb.items()}
            assert recent.num_held(asked, float(now_s) / 100) == {w: count for w, count in held.items() if count}
