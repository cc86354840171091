"""When a fetch is expected to beat computing, and how much is fetched at once."""

from services.rates import RateLearner, StepShape
from services.worker.prefixes import FetchCosts

BYTES_PER_TOKEN = 10_000


def learner(prefill_tokens_per_s: float, fetch_tokens_per_s: float, holder_id: str = "peer") -> RateLearner:
    learned = RateLearner()
    for num_tokens in (100, 1000, 10_000):
        learned.step_ended(StepShape(num_tokens), num_tokens / prefill_tokens_per_s)
        learned.fetched(holder_id, "device", num_tokens, num_tokens / fetch_tokens_per_s)
    return learned


def test_before_anything_was_computed_a_fetch_is_tried() -> None:
    assert FetchCosts(RateLearner(), BYTES_PER_TOKEN).fetching_pays("peer", "disk", 32, start=0)


def test_a_fetch_pays_when_it_takes_less_than_computing() -> None:
    assert FetchCosts(learner(1000, 10_000), BYTES_PER_TOKEN).fetching_pays("peer", "device", 1000, start=0)
    assert not FetchCosts(learner(10_000, 1000), BYTES_PER_TOKEN).fetching_pays("peer", "device", 1000, start=0)


def test_a_slow_holder_does_not_spoil_a_fast_one() -> None:
    learned = learner(1000, 10_000, "fast")
    costs = FetchCosts(learned, BYTES_PER_TOKEN)
    for _ in range(5):
        learned.fetched("slow", "device", 1000, 10.0)
        learned.fetched("fast", "device", 1000, 0.1)
    assert not costs.fetching_pays("slow", "device", 1000, start=0)
    assert costs.fetching_pays("fast", "device", 1000, start=0)


def test_the_policy_can_decide_without_looking_at_the_costs() -> None:
    slow, fast = learner(1e6, 1), learner(1, 1e6)
    assert FetchCosts(slow, BYTES_PER_TOKEN, "always").fetching_pays("peer", "device", 32, start=0)
    assert not FetchCosts(fast, BYTES_PER_TOKEN, "never").fetching_pays("peer", "device", 32, start=0)
    assert not FetchCosts(RateLearner(), BYTES_PER_TOKEN, "never").fetching_pays("peer", "device", 32, 0)


def test_a_piece_is_as_much_as_comes_in_its_time_and_never_small() -> None:
    num_bytes = 64 * 2**20 // 100
    assert FetchCosts(RateLearner(), num_bytes).piece_tokens("peer", "device") == 100
    assert FetchCosts(learner(1000, 10), num_bytes).piece_tokens("peer", "device") == 100
    assert 20_000 < FetchCosts(learner(1000, 100_000), num_bytes).piece_tokens("peer", "device") < 30_000
