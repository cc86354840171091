"""The sampler against plain references: the same sets, the same order of operations, the right frequencies."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.api import SampledToken, SamplingParams
from services.engine.native.sampling import sampler
from services.engine.native.sampling.gumbel import gumbel, noise_keys
from services.engine.native.sampling.sampler import (
    NoToken,
    SamplingRow,
    position_logprobs,
    sample,
)

torch.set_num_threads(1)

MASK = 2**64 - 1


def row(prompt: Sequence[int] = (), outputs: Sequence[int] = (), **sampling: object) -> SamplingRow:
    return SamplingRow(SamplingParams(**{"max_tokens": 1000, **sampling}), prompt, outputs)  # type: ignore[arg-type]


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def tokens(results: Sequence[SampledToken | NoToken]) -> list[int | None]:
    return [result.token_id if isinstance(result, SampledToken) else None for result in results]


# ---- a reference that a reader can check --------------------------------------------


def reference_gumbel(seed: int, position: int, token_id: int) -> float:
    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix((mix((seed + golden) & MASK) + (position + 1) * golden) & MASK)
    uniform = ((mix((key + (token_id + 1) * golden) & MASK) >> 12) + 0.5) / 2**52
    return -math.log(-math.log(uniform))


def reference_edit(logits: list[float], r: SamplingRow, eos_token_ids: Sequence[int]) -> list[np.float32]:
    """In float32, as the sampler: whether two edited logits are equal decides what the filters keep."""
    s, single = r.sampling, np.float32
    edited = [single(value) for value in logits]
    for t in range(len(edited)):
        if s.allowed_token_ids and t not in s.allowed_token_ids:
            edited[t] = single(-math.inf)
        if len(r.output_token_ids) < s.min_tokens and (t in eos_token_ids or t in s.stop_token_ids):
            edited[t] = single(-math.inf)
        edited[t] += single(s.logit_bias.get(t, 0.0))
        if t in r.prompt_token_ids or t in r.output_token_ids:
            penalty = single(s.repetition_penalty)
            edited[t] = edited[t] / penalty if edited[t] > 0 else edited[t] * penalty
        count = list(r.output_token_ids).count(t)
        edited[t] -= single(s.frequency_penalty * count + s.presence_penalty * (count > 0))
    return edited


def reference_kept(scaled: list[float], s: SamplingParams) -> set[int]:
    """min_p, then top_k, then top_p, each on what the one before left; ties at a border are kept together."""

    def softmax(kept: list[int]) -> dict[int, float]:
        largest = max(scaled[t] for t in kept)
        weights = {t: math.exp(scaled[t] - largest) for t in kept}
        return {t: weight / sum(weights.values()) for t, weight in weights.items()}

    kept = [t for t in range(len(scaled)) if scaled[t] > -math.inf]
    if s.min_p > 0:
        probabilities = softmax(kept)
        kept = [t for t in kept if probabilities[t] >= s.min_p * max(probabilities.values())]
    if 0 < s.top_k < len(kept):
        border = sorted((scaled[t] for t in kept), reverse=True)[s.top_k - 1]
        kept = [t for t in kept if scaled[t] >= border]
    if s.top_p < 1:
        probabilities = softmax(kept)
        before = 0.0
        border = math.inf
        for t in sorted(kept, key=lambda t: -scaled[t]):
            if before >= s.top_p:
                break
            border = scaled[t]
            before += probabilities[t]
        kept = [t for t in kept if scaled[t] >= border]
    return set(kept)


def reference_filtered_draw(logits: list[float], r: SamplingRow, eos_token_ids: Sequence[int] = ()) -> int:
    temperature = np.float32(r.sampling.temperature)
    scaled = [float(value / temperature) for value in reference_edit(logits, r, eos_token_ids)]
    kept = reference_kept(scaled, r.sampling)
    return max(kept, key=lambda t: scaled[t] + reference_gumbel(r.sampling.seed, r.position, t))


# ---- greedy ---------------------------------------------------------------------------


def test_greedy_takes_the_largest_logit_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, 2.0]])
    assert tokens(sample(logits, [row(temperature=0.0)] * 2)) == [1, 0]


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(3, 50)
    before = logits.clone()
    sample(logits, [row(temperature=0.0), row(logit_bias={3: 5.0}, top_k=3), row(repetition_penalty=2.0, prompt=[1])])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"logit_bias": {4: 100.0}}, 4),
        ({"allowed_token_ids": (7,)}, 7),
        ({"logit_bias": {0: -100.0, 1: -100.0}, "allowed_token_ids": (0, 1, 9)}, 9),
    ],
)
def test_bias_and_allowed_tokens_steer_every_kind_of_row(
    temperature: float, options: dict[str, object], kept: int
) -> None:
    logits = random_logits(1, 20, scale=0.1)
    assert tokens(sample(logits, [row(temperature=temperature, **options)])) == [kept]


def test_min_tokens_forbids_ends_until_it_is_reached() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 1.0]])
    params: dict[str, object] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (1,)}
    assert tokens(sample(logits, [row(outputs=[3], **params)], eos_token_ids=(0,))) == [2]
    assert tokens(sample(logits, [row(outputs=[3, 3], **params)], eos_token_ids=(0,))) == [0]


def test_min_tokens_does_not_forbid_an_end_that_is_ignored() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 5] = 9.0
    for temperature in (0.0, 1e-5):
        ignoring = row(min_tokens=3, ignore_eos=True, temperature=temperature)
        assert tokens(sample(logits, [ignoring], eos_token_ids=[5])) == [5]
        also_a_stop = row(min_tokens=3, ignore_eos=True, temperature=temperature, stop_token_ids=(5,))
        assert tokens(sample(logits, [also_a_stop], eos_token_ids=[5])) != [5]


def test_penalties_act_on_what_was_said() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.2]])
    assert tokens(sample(logits, [row(temperature=0.0, prompt=[0], repetition_penalty=1.2)])) == [1]
    assert tokens(sample(logits, [row(temperature=0.0, outputs=[0, 0], frequency_penalty=0.1)])) == [1]
    assert tokens(sample(logits, [row(temperature=0.0, outputs=[0, 0], presence_penalty=0.05)])) == [0]
    assert tokens(sample(logits, [row(temperature=0.0, outputs=[0, 0], presence_penalty=0.2)])) == [1]
    assert tokens(sample(logits, [row(temperature=0.0, prompt=[0], presence_penalty=2.0, frequency_penalty=2.0)])) == [
        0
    ]


# ---- drawn rows -------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    vocab_size=st.integers(2, 40),
    candidates=st.sampled_from([3, 8, 256]),
    logits_seed=st.integers(0, 1000),
    step=st.sampled_from([0.0, 0.5]),
    options=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.3, 1.0, 1.7]),
            "top_k": st.sampled_from([0, 1, 2, 5, 30]),
            "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.999]),
            "min_p": st.sampled_from([0.0, 0.01, 0.2]),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
            "frequency_penalty": st.sampled_from([0.0, 0.7]),
            "presence_penalty": st.sampled_from([0.0, -0.4]),
            "logit_bias": st.sampled_from([{}, {1: 2.5, 0: -3.0}]),
            "allowed_token_ids": st.sampled_from([(), (0, 1, 5, 7, 8, 9)]),
            "min_tokens": st.sampled_from([0, 5]),
            "seed": st.integers(0, MASK),
        }
    ),
    outputs=st.lists(st.integers(0, 1), max_size=6),
)
def test_a_filtered_draw_is_the_reference_draw(
    vocab_size: int,
    candidates: int,
    logits_seed: int,
    step: float,
    options: dict[str, object],
    outputs: list[int],
) -> None:
    logits = random_logits(1, vocab_size, logits_seed)
    if step:  # many equal logits, as 16-bit models give them
        logits = (logits / step).round() * step
    r = row(prompt=[1], outputs=outputs, **options)
    eos_token_ids = (0,) if vocab_size > 2 else ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "NUM_CANDIDATES", candidates)
        (token,) = tokens(sample(logits, [r], eos_token_ids))
    assert token == reference_filtered_draw(logits[0].tolist(), r, eos_token_ids)


def test_few_candidates_and_a_full_sort_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(40, 2000, scale=1.0)
    rows = [row(top_p=p, min_p=m, top_k=k, seed=i) for i, (p, m, k) in enumerate([(0.5, 0.0, 0), (0.9, 0.01, 0)] * 10)]
    rows += [row(top_p=p, top_k=k, seed=i) for i, (p, k) in enumerate([(1.0, 300), (0.7, 100)] * 10)]
    expected = tokens(sample(logits, rows))
    monkeypatch.setattr(sampler, "NUM_CANDIDATES", 5000)
    assert tokens(sample(logits, rows)) == expected


def chi_square(counts: Counter[int], probabilities: Sequence[float], num_draws: int) -> tuple[float, int]:
    """The statistic over the cells with an expectation of at least 5, the others together; degrees of freedom."""
    cells = [(counts[t], p * num_draws) for t, p in enumerate(probabilities)]
    large = [cell for cell in cells if cell[1] >= 5]
    rest = [cell for cell in cells if cell[1] < 5]
    if sum(expected for _, expected in rest) >= 5:
        large.append((sum(observed for observed, _ in rest), sum(expected for _, expected in rest)))
    return sum((observed - expected) ** 2 / expected for observed, expected in large), len(large) - 1


@pytest.mark.parametrize(
    ("vocab_size", "options"),
    [
        (10, {}),
        (600, {"temperature": 0.7}),  # three groups: the draw in two levels
        (600, {"top_p": 0.8}),
        (600, {"top_k": 20, "temperature": 1.5}),
        (600, {"min_p": 0.05}),
    ],
)
@pytest.mark.parametrize("varied", ["seed", "position"])
def test_tokens_come_as_often_as_they_should(vocab_size: int, options: dict[str, object], varied: str) -> None:
    num_draws = 4000
    logits = random_logits(1, vocab_size, seed=4, scale=2.0)
    if varied == "seed":
        rows = [row(seed=seed, **options) for seed in range(num_draws)]
    else:
        rows = [row(seed=11, prompt=range(position), **options) for position in range(num_draws)]
    counts = Counter(tokens(sample(logits.expand(num_draws, -1), rows)))
    params = rows[0].sampling
    scaled = (logits[0] / params.temperature).tolist()
    kept = reference_kept(scaled, params)
    masked = torch.tensor([value if t in kept else -math.inf for t, value in enumerate(scaled)])
    statistic, freedom = chi_square(counts, masked.softmax(0).tolist(), num_draws)
    assert set(counts) <= kept
    # Mean `freedom`, variance twice that: five standard deviations are out of reach of a fair draw.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_the_noise_is_the_documented_hash() -> None:
    drawn, counters = [(0, 0), (1, 5), (MASK, 900)], [0, 1, 31999, (1 << 40) + 3]
    noise = gumbel(noise_keys(drawn, torch.device("cpu")), torch.tensor(counters))
    for i, (seed, position) in enumerate(drawn):
        for j, counter in enumerate(counters):
            assert noise[i, j].item() == pytest.approx(reference_gumbel(seed, position, counter), rel=1e-12)


# ---- rows stand alone ---------------------------------------------------------------------


def mixed_rows(num_rows: int) -> list[SamplingRow]:
    options: list[dict[str, object]] = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.9},
        {"top_k": 40, "logprobs": 3},
        {"min_p": 0.02, "temperature": 0.7, "logprobs": 0},
        {"repetition_penalty": 1.2, "prompt": [1, 2, 3]},
        {"temperature": 0.0, "outputs": [4, 4], "frequency_penalty": 0.5, "logprobs": 5},
        {"top_p": 0.9999, "temperature": 3.0, "logprobs": 5},
        {"logit_bias": {7: 1.0}, "top_k": 500},
    ]
    return [row(seed=i, **options[i % len(options)]) for i in range(num_rows)]


def test_a_row_gets_the_same_alone_and_among_others() -> None:
    logits = random_logits(36, 1000)
    rows = mixed_rows(36)
    together = sample(logits, rows, eos_token_ids=(2,))
    alone = [sample(logits[i : i + 1], rows[i : i + 1], eos_token_ids=(2,))[0] for i in range(36)]
    reverse = sample(logits.flip(0), rows[::-1], eos_token_ids=(2,))[::-1]
    assert together == alone == reverse


def test_a_millionth_in_the_logits_does_not_change_the_tokens() -> None:
    logits = random_logits(270, 1000)
    rows = mixed_rows(270)
    nudged = logits + (torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) - 0.5) * 2e-6
    assert tokens(sample(logits, rows)) == tokens(sample(nudged, rows))


extremes = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-44, 1e-30, 1e-5, 1.0, 1e10, 3e38]),
        "repetition_penalty": st.sampled_from([1e-37, 1e-36, 1e-20, 1e-3, 1e6, 1e37]),
        "frequency_penalty": st.sampled_from([-2.0, 2.0]),
        "presence_penalty": st.sampled_from([-2.0, 2.0]),
        "top_p": st.sampled_from([1e-44, 1e-7, 0.5]),
        "top_k": st.sampled_from([-1, 1, 3, 2**31 - 1]),
        "min_p": st.sampled_from([1e-44, 1e-7, 1.0]),
        "logit_bias": st.just({3: 100.0, 4: -100.0, 5: -100.0}),
        "allowed_token_ids": st.sampled_from([(4,), (2, 4, 5), tuple(range(300))]),
    },
)


@given(options=extremes, scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4, 1e9]), seed=st.integers(0, 9))
@settings(max_examples=300, deadline=None)
def test_no_legal_parameter_leaves_a_row_without_a_token(options: dict[str, object], scale: float, seed: int) -> None:
    logits = random_logits(2, 300, seed, scale)
    extreme, plain = row([2, 4, 7], [4, 4, 9], **options, seed=seed), row([1], seed=seed)
    token, plain_token = tokens(sample(logits, [extreme, plain]))
    assert token is not None
    assert token in (extreme.sampling.allowed_token_ids or range(300))
    assert [plain_token] == tokens(sample(logits[1:], [plain]))


def test_a_tiny_repetition_penalty_prefers_the_largest_of_what_was_said() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 8.0]])
    for penalty in (1e-37, 1e-30, 1e-10):
        for temperature in (0.0, 1e-5, 1.0):
            said = row([1, 2], repetition_penalty=penalty, temperature=temperature)
            assert tokens(sample(logits, [said])) in ([[2]] if penalty >= 1e-30 else [[1], [2]])


def test_what_is_not_finite_fails_alone() -> None:
    logits = random_logits(4, 300)
    logits[0, 5] = math.nan
    logits[1, 7] = math.nan
    logits[2, :] = -math.inf
    rows = [row(temperature=0.0), row(top_k=3), row(), row(top_p=0.5)]
    results = sample(logits, rows)
    assert [isinstance(result, NoToken) for result in results] == [True, True, True, False]
    assert isinstance(results[1], NoToken)
    assert results[1].reason == "1 of 300 logits at position 0 are not finite"


def test_a_row_without_a_permitted_token_fails_with_a_reason() -> None:
    params: dict[str, object] = {"allowed_token_ids": (2,), "min_tokens": 1}
    (result,) = sample(random_logits(1, 5), [row(temperature=0.0, **params)], eos_token_ids=(2,))
    assert isinstance(result, NoToken)
    assert "leave no token at position 0" in result.reason


# ---- logprobs -------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(1, 700)
    (result,) = sample(logits, [row(logit_bias={3: 100.0}, temperature=0.5, logprobs=4)])
    expected = logits[0].double().log_softmax(0)
    assert isinstance(result, SampledToken)
    assert result.token_id == 3
    assert result.logprobs is not None
    assert result.logprobs.chosen is not None
    assert result.logprobs.chosen.logprob == pytest.approx(expected[3].item(), abs=1e-5)
    assert result.logprobs.chosen.rank == 1 + int((logits[0] > logits[0, 3]).sum())
    best = logits[0].argsort(descending=True)[:4].tolist()
    assert [(top.token_id, top.rank) for top in result.logprobs.top] == list(zip(best, [1, 2, 3, 4], strict=True))
    for top in result.logprobs.top:
        assert top.logprob == pytest.approx(expected[top.token_id].item(), abs=1e-5)


def test_logprobs_are_given_only_where_asked_for_and_as_many() -> None:
    rows = [row(), row(logprobs=0), row(logprobs=20)]
    results = sample(random_logits(3, 10), rows)
    counts = [None if r.logprobs is None else len(r.logprobs.top) for r in results if isinstance(r, SampledToken)]
    assert counts == [None, 0, 10]


def test_equal_logits_are_listed_by_token_id() -> None:
    (position,) = position_logprobs(torch.tensor([[1.0, 5.0, 5.0, 5.0, 0.0]]), [3], num_top=3)
    assert [top.token_id for top in position.top] == [1, 2, 3]
    assert position.chosen is not None
    assert position.chosen.rank == 1
