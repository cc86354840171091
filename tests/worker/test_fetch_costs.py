"""When a fetch is expected to beat computing."""

from services.worker.fetch_costs import FetchCosts, FetchPolicy

MB = 1_000_000


def test_before_anything_was_computed_a_fetch_is_tried() -> None:
    assert FetchCosts().fetching_pays("peer", num_tokens=32, num_bytes=100 * MB)


def test_a_fetch_pays_when_it_takes_less_than_computing() -> None:
    costs = FetchCosts(overhead_s=0.01, bandwidth_bytes_per_s=100 * MB)
    costs.computed(num_tokens=1000, seconds=1.0)
    assert costs.fetching_pays("peer", num_tokens=100, num_bytes=5 * MB)  # 60 ms against 100 ms
    assert not costs.fetching_pays("peer", num_tokens=100, num_bytes=10 * MB)  # 110 ms against 100 ms
    assert not costs.fetching_pays("peer", num_tokens=5, num_bytes=1000)  # the overhead alone is more


def test_each_holder_has_its_own_bandwidth() -> None:
    costs = FetchCosts(overhead_s=0.0)
    costs.computed(num_tokens=1000, seconds=1.0)
    for _ in range(20):
        costs.fetched("slow", num_bytes=10 * MB, seconds=10.0)
        costs.fetched("fast", num_bytes=10 * MB, seconds=0.01)
    assert not costs.fetching_pays("slow", num_tokens=500, num_bytes=10 * MB)
    assert costs.fetching_pays("fast", num_tokens=500, num_bytes=10 * MB)


def test_small_fetches_teach_the_overhead() -> None:
    costs = FetchCosts(overhead_s=0.001)
    for _ in range(20):
        costs.fetched("peer", num_bytes=1000, seconds=0.5)
    assert 0.4 < costs.fetch_s("peer", num_bytes=1000) < 0.6


def test_a_single_outlier_does_not_decide() -> None:
    costs = FetchCosts()
    for _ in range(10):
        costs.computed(num_tokens=1000, seconds=1.0)
    costs.computed(num_tokens=1000, seconds=100.0)
    assert costs.prefill_tokens_per_s is not None
    assert costs.prefill_tokens_per_s > 500


def test_the_policy_can_decide_without_looking_at_the_costs():
    slow = {"overhead_s": 100.0, "prefill_tokens_per_s": 1e6}
    assert FetchCosts(FetchPolicy.ALWAYS, **slow).fetching_pays("peer", num_tokens=32, num_bytes=100 * MB)
    assert not FetchCosts(FetchPolicy.NEVER).fetching_pays("peer", num_tokens=32, num_bytes=1)


def test_of_holders_without_end_the_latest_are_remembered() -> None:
    costs = FetchCosts()
    for number in range(5000):
        costs.fetched(f"holder-{number}", 1 << 20, 0.01)
    assert len(costs._bandwidth_of) == 1024
    assert "holder-4999" in costs._bandwidth_of
