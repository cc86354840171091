"""Defines sampling: a pure function of (logits, parameters, seed, position, the request's own tokens).

Nothing is remembered between calls and no row looks at another, so any worker can continue any stream at any token.

Randomness is counter-based: a 64-bit hash of (seed, position, token id) becomes one Gumbel variate per candidate, and
the largest of scaled logit + Gumbel wins (the Gumbel-max trick, which draws exactly from the softmax). Logits that
differ by 1e-6, as from another batch shape or worker, change the token only where two candidates are that close; with
the usual inverse of a cumulative sum, a shift anywhere below the drawn number moves every border.

The order of operations is vLLM's: allowed_token_ids, min_tokens, logit_bias, penalties (repetition, frequency,
presence), temperature, min_p, top_k, top_p. Logprobs are those of the raw logits, before all of it.

This is torch on any device. On CPUs the same tokens are found faster in C (`batch_sampler.py`), which leaves to this
what it cannot tell for certain.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.native.sampling.gumbel import gumbel, noise_keys
from services.engine.native.sampling.row import NoToken, SamplingRow
from services.engine.request import PositionLogprobs, SampledToken, SamplingParams, TokenLogprob

# The most likely tokens that min_p, top_k and top_p look at first. They hold nearly all of the mass nearly always;
# where not, the row is sorted, which at 32,000 tokens costs 15 times as much.
NUM_CANDIDATES = 256
# Log-sums and unfiltered draws go by groups of so many neighbouring tokens.
_GROUP = 256
# Edited logits stay within this, so that no temperature above greedy takes them out of float32's range.
_LARGEST_LOGIT = 1e33
# Counters of groups start here, far above any token id.
_GROUP_COUNTER = 1 << 40


def sample(
    logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int] = ()
) -> list[SampledToken | NoToken]:
    """Choose one token per row of `logits`, float32 `[len(rows), vocab_size]`, which are left as they are.

    A row that is not finite, or whose parameters forbid every token, gives `NoToken` and disturbs no other row.
    """
    return describe(logits, rows, choose(logits, rows, eos_token_ids))


def choose(logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int]) -> list[int | None]:
    """Return `sample`'s tokens by themselves; None where there is none."""
    plain = [i for i, row in enumerate(rows) if row.sampling.is_greedy and not row.changes_logits]
    others = [i for i, row in enumerate(rows) if not row.sampling.is_greedy or row.changes_logits]
    chosen: list[int | None] = [None] * len(rows)
    if plain:
        token_ids = _argmax(_select(logits, plain))
        for i, token_id in zip(plain, token_ids, strict=True):
            chosen[i] = token_id
    if others:
        token_ids = _sample_edited(
            padded(_select(logits, others)), [rows[i] for i in others], logits.shape[1], eos_token_ids
        )
        for i, token_id in zip(others, token_ids, strict=True):
            chosen[i] = token_id
    return chosen


def describe(logits: Tensor, rows: Sequence[SamplingRow], chosen: Sequence[int | None]) -> list[SampledToken | NoToken]:
    """Put logprobs to the chosen tokens where they were asked for, and a reason where there is no token."""
    logprobs = _logprobs_where_asked(logits, rows, chosen)
    return [
        NoToken(_explain(logits[i], rows[i])) if token_id is None else SampledToken(token_id, row_logprobs)
        for i, (token_id, row_logprobs) in enumerate(zip(chosen, logprobs, strict=True))
    ]


def position_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[PositionLogprobs]:
    """Per row of `logits` `[n, vocab_size]`: logprob and rank of the token in `token_ids`, and the `num_top` best."""
    chosen = torch.tensor(token_ids, dtype=torch.int64, device=logits.device).unsqueeze(1)
    log_sums = log_sum_exp(padded(logits)).unsqueeze(1)
    chosen_logits = logits.gather(1, chosen)
    ranks = (logits > chosen_logits).sum(dim=1) + 1
    top_logits, top_ids = logits.topk(min(num_top, logits.shape[1]), dim=1)
    columns = zip(
        token_ids,
        (chosen_logits - log_sums).squeeze(1).tolist(),
        ranks.tolist(),
        (top_logits - log_sums).tolist(),
        top_ids.tolist(),
        strict=True,
    )
    return [
        PositionLogprobs(TokenLogprob(token_id, logprob, rank), _ranked(top_values, top))
        for token_id, logprob, rank, top_values, top in columns
    ]


def _ranked(logprobs: list[float], token_ids: list[int]) -> tuple[TokenLogprob, ...]:
    # Equal ones by token id: topk leaves their order open.
    ordered = sorted(zip(logprobs, token_ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return tuple(TokenLogprob(token_id, logprob, rank) for rank, (logprob, token_id) in enumerate(ordered, start=1))


def _logprobs_where_asked(
    logits: Tensor, rows: Sequence[SamplingRow], chosen: Sequence[int | None]
) -> list[PositionLogprobs | None]:
    found: list[PositionLogprobs | None] = [None] * len(rows)
    by_num_top: dict[int, list[tuple[int, int]]] = {}
    for i, (row, token_id) in enumerate(zip(rows, chosen, strict=True)):
        if row.sampling.logprobs is not None and token_id is not None:
            by_num_top.setdefault(row.sampling.logprobs, []).append((i, token_id))
    # By number, so that what a row gets depends on nothing that its neighbours ask for.
    for num_top, asked in by_num_top.items():
        positions = position_logprobs(
            _select(logits, [i for i, _ in asked]), [token_id for _, token_id in asked], num_top
        )
        for (i, _), position in zip(asked, positions, strict=True):
            found[i] = position
    return found


def _explain(logits: Tensor, row: SamplingRow) -> str:
    num_bad = int((~logits.isfinite()).sum())
    if num_bad:
        return f"{num_bad} of {logits.shape[0]} logits at position {row.position} are not finite"
    return f"allowed_token_ids, logit_bias and min_tokens leave no token at position {row.position}"


def _argmax(logits: Tensor) -> list[int | None]:
    """The largest entry of each row, the first one if there are several; None where it is not finite."""
    if logits.device.type == "cpu":
        # numpy's argmax on float32 takes a tenth of torch's time, and prefers NaN as torch's does.
        token_ids = torch.from_numpy(logits.numpy().argmax(axis=1))
    else:
        token_ids = logits.argmax(dim=1)
    is_finite = logits.gather(1, token_ids.unsqueeze(1)).isfinite().squeeze(1).tolist()
    return [token_id if finite else None for token_id, finite in zip(token_ids.tolist(), is_finite, strict=True)]


# ---- parameters that change logits ------------------------------------------


def _edit(logits: Tensor, row: SamplingRow, eos_token_ids: Sequence[int]) -> None:
    """Apply allowed_token_ids, min_tokens, logit_bias and penalties to one row `[vocab_size]`, in place."""
    sampling, device = row.sampling, logits.device

    def index(token_ids: Iterable[int]) -> Tensor:
        known = [token_id for token_id in token_ids if token_id < logits.shape[0]]
        return torch.tensor(known, dtype=torch.int64, device=device)

    def known(token_ids: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(token_ids[token_ids < logits.shape[0]]).to(device)

    if sampling.allowed_token_ids:
        allowed = known(sampling.allowed_index)
        kept = logits[allowed]
        logits.fill_(-math.inf)
        logits[allowed] = kept
    if len(row.output_token_ids) < sampling.min_tokens:
        logits[known(sampling.stop_index)] = -math.inf
        if not sampling.ignore_eos:
            logits[index(eos_token_ids)] = -math.inf
    if sampling.logit_bias:
        biases = sampling.biases[sampling.biased_index < logits.shape[0]]
        logits[known(sampling.biased_index)] += torch.from_numpy(biases).to(device)
    if sampling.repetition_penalty != 1.0:
        seen = index(sorted({*row.prompt_token_ids, *row.output_token_ids}))
        values = logits[seen]
        penalty = sampling.repetition_penalty
        penalized = torch.where(values > 0, values / penalty, values * penalty)
        # What is forbidden stays so, and a NaN is seen by whoever looks at the row.
        bounded = penalized.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
        logits[seen] = torch.where(values.isfinite(), bounded, values)
    if (sampling.frequency_penalty or sampling.presence_penalty) and row.output_token_ids:
        counts = Counter(row.output_token_ids)
        penalties = [sampling.frequency_penalty * count + sampling.presence_penalty for count in counts.values()]
        logits[index(list(counts))] -= torch.tensor(penalties, dtype=torch.float32, device=device)


# ---- drawing ------------------------------------------------------------------


def _sample_edited(
    logits: Tensor, rows: Sequence[SamplingRow], vocab_size: int, eos_token_ids: Sequence[int]
) -> list[int | None]:
    """Edit, then choose. `logits` `[n, vocab_size padded]` are the caller's to lose."""
    for row_logits, row in zip(logits, rows, strict=True):
        if row.changes_logits:
            _edit(row_logits[:vocab_size], row, eos_token_ids)
    # A maximum is NaN where any entry is.
    usable = logits.amax(dim=1).isfinite().tolist()
    greedy = [i for i, row in enumerate(rows) if usable[i] and row.sampling.is_greedy]
    drawn = [i for i, row in enumerate(rows) if usable[i] and not row.sampling.is_greedy]
    filtered = [i for i in drawn if _has_filter(rows[i].sampling, vocab_size)]
    unfiltered = [i for i in drawn if not _has_filter(rows[i].sampling, vocab_size)]
    chosen: list[int | None] = [None] * len(rows)
    for indices, choose in ((greedy, _choose_greedy), (unfiltered, _draw_from_all), (filtered, _draw_from_filtered)):
        if indices:
            token_ids = choose(_select(logits, indices), [rows[i] for i in indices])
            for i, token_id in zip(indices, token_ids, strict=True):
                chosen[i] = token_id
    return chosen


def _has_filter(sampling: SamplingParams, vocab_size: int) -> bool:
    return sampling.min_p > 0.0 or 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0


def _choose_greedy(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    return _argmax(logits)


def _scale(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    temperatures = [row.sampling.temperature for row in rows]
    return logits.div_(torch.tensor(temperatures, dtype=torch.float32, device=logits.device).unsqueeze(1))


def _draw_from_all(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Draw from the softmax of whole rows, in two levels: first a group of neighbouring tokens, then one of them.

    The maximum of a group's logits + Gumbels is itself a Gumbel around the group's log-sum-exp, so the distribution is
    the same as with one variate per token, for a hundredth of the hashing.
    """
    num_rows, device = len(rows), logits.device
    groups = _scale(logits, rows).view(num_rows, -1, _GROUP)
    sums = _group_log_sums(groups)
    keys = _noise_keys(rows, device)
    counters = torch.arange(groups.shape[1], device=device) + _GROUP_COUNTER
    group = (sums.double() + gumbel(keys, counters)).argmax(dim=1)
    in_group = groups[torch.arange(num_rows, device=device), group]
    token_ids = group.unsqueeze(1) * _GROUP + torch.arange(_GROUP, device=device)
    best = (in_group.double() + gumbel(keys, token_ids)).argmax(dim=1)
    found: list[int] = (group * _GROUP + best).tolist()
    return found


def _draw_from_filtered(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Draw from what min_p, top_k and top_p leave."""
    scaled = _scale(logits, rows)
    values, token_ids = scaled.topk(min(NUM_CANDIDATES, scaled.shape[1]), dim=1)
    thresholds, is_certain = _thresholds(values, _filters(rows, scaled.device), scaled)
    keys = _noise_keys(rows, scaled.device)
    scores = torch.where(values >= thresholds, values.double() + gumbel(keys, token_ids), -math.inf)
    chosen: list[int] = token_ids.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1).tolist()
    for i, certain in enumerate(is_certain):
        if not certain:
            chosen[i] = _draw_sorted(scaled[i : i + 1], rows[i : i + 1])
    return chosen


def _draw_sorted(scaled: Tensor, rows: Sequence[SamplingRow]) -> int:
    """Draws likewise for one row `[1, vocab_size]`, looking at every token."""
    values = _falling(scaled)
    threshold, _ = _thresholds(values, _filters(rows, scaled.device), scaled)
    token_ids = (scaled >= threshold)[0].nonzero().T
    scores = scaled.gather(1, token_ids).double() + gumbel(_noise_keys(rows, scaled.device), token_ids)
    return int(token_ids[0, scores.argmax(dim=1)])


@dataclass(frozen=True)
class _Filters:
    """One column `[n, 1]` per parameter."""

    log_min_p: Tensor  # -inf is off
    top_k: Tensor  # int64; larger than any vocabulary is off
    top_p: Tensor  # float64; 1 is off


def _filters(rows: Sequence[SamplingRow], device: torch.device) -> _Filters:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)

    params = [row.sampling for row in rows]
    top_ks = [p.top_k if p.top_k > 0 else 2**31 for p in params]
    return _Filters(
        log_min_p=column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params]).float(),
        top_k=torch.tensor(top_ks, dtype=torch.int64, device=device).unsqueeze(1),
        top_p=column([p.top_p for p in params]),
    )


def _thresholds(values: Tensor, filters: _Filters, scaled: Tensor) -> tuple[Tensor, list[bool]]:
    """The value `[n, 1]` that a token must reach to be kept, so that ties are kept or dropped together.

    `values` `[n, c]` are each row's largest, in falling order. Where they are not the whole row, the second result
    tells for which rows they are certain to hold all that is kept.
    """
    num_values = values.shape[1]
    is_whole = num_values == scaled.shape[1]
    smallest = values[:, -1:]
    # min_p: at least so much of the largest probability.
    threshold = values[:, :1] + filters.log_min_p
    # top_k: at least as large as the k-th.
    kth = values.gather(1, filters.top_k.clamp(max=num_values) - 1)
    threshold = torch.where(filters.top_k <= num_values, torch.maximum(threshold, kth), threshold)
    # top_p: in falling order, all before whom less than p of the mass lies, the mass being that of the kept.
    wide = values.double()
    kept = torch.where(values >= threshold, wide, -math.inf)
    holds_all = (threshold > smallest) | is_whole
    log_mass = kept.logsumexp(dim=1, keepdim=True)
    is_open = (threshold == -math.inf) & (filters.top_k >= scaled.shape[1])  # nothing but top_p
    if bool((is_open & ~holds_all).any()):
        whole_mass = log_sum_exp(scaled).double().unsqueeze(1)
        log_mass = torch.where(is_open & ~holds_all, whole_mass, log_mass)
    shares = (kept - log_mass).exp()
    before = shares.cumsum(dim=1) - shares
    # The first one is kept always: nothing lies before it.
    last = ((before < filters.top_p) & (values >= threshold)).sum(dim=1, keepdim=True).clamp(min=1) - 1
    nucleus = torch.where(filters.top_p < 1.0, values.gather(1, last), threshold)
    # Certain: the border lies above the smallest value that we see, and the mass before it was a known one.
    is_certain = ((nucleus > smallest) & (holds_all | is_open)) | is_whole
    return torch.maximum(threshold, nucleus), is_certain.squeeze(1).tolist()


def _falling(scaled: Tensor) -> Tensor:
    """Each row's values in falling order."""
    if scaled.device.type == "cpu":
        # numpy's sort takes a tenth of torch's time, which finds the order's indices as well.
        return torch.from_numpy(np.sort(scaled.numpy(), axis=1)[:, ::-1].copy())
    return scaled.sort(dim=1, descending=True).values


# ---- rows and sums --------------------------------------------------------------


def _noise_keys(rows: Sequence[SamplingRow], device: torch.device) -> Tensor:
    return noise_keys(((row.sampling.seed, row.position) for row in rows), device)


def _select(logits: Tensor, indices: Sequence[int]) -> Tensor:
    """The rows of these rising indices; without a copy where they are all there are."""
    return logits if len(indices) == logits.shape[0] else logits[list(indices)]


def padded(logits: Tensor) -> Tensor:
    """A copy whose rows are filled up with -inf to a whole number of groups."""
    num_rows, vocab_size = logits.shape
    copy = logits.new_empty((num_rows, padded_size(vocab_size)))
    copy[:, :vocab_size] = logits
    copy[:, vocab_size:] = -math.inf
    return copy


def padded_size(vocab_size: int) -> int:
    """Return the size of whole groups that hold so many tokens."""
    return -(-vocab_size // _GROUP) * _GROUP


def _group_log_sums(groups: Tensor) -> Tensor:
    """log(sum(exp)) over the last axis of `[n, groups, _GROUP]`; -inf for a group of nothing else."""
    largest = groups.amax(dim=2, keepdim=True)
    base = torch.where(largest == -math.inf, 0.0, largest)
    # In place: a second array of this size costs more than the arithmetic on it.
    return ((groups - base).exp_().sum(dim=2, keepdim=True).log() + base).squeeze(2)


def log_sum_exp(padded: Tensor) -> Tensor:
    """log(sum(exp)) of each row `[n, k * _GROUP]`.

    In two levels: torch splits one long sum over its threads where it is the only one, so that a row alone would get
    other bits than a row among others.
    """
    sums = _group_log_sums(padded.view(padded.shape[0], -1, _GROUP))
    largest = sums.amax(dim=1, keepdim=True)
    return ((sums - largest).exp().sum(dim=1, keepdim=True).log() + largest).squeeze(1)
