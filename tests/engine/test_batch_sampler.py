"""The C library samples what the definition does: for any parameters, and where a token hangs on the last bit."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.api import SamplingParams
from services.engine.native.build import SAMPLER_SOURCES, sampler_flags
from services.engine.native.sampling import Sampler, SamplingRow, sample, sampler
from services.engine.native.sampling.library import NotChosen, SamplerLibrary, with_mass

torch.set_num_threads(1)

EOS = (2, 7)


@pytest.fixture(scope="session")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, built from the sources here. Sanitizers come by TANDEM_KERNEL_TEST_FLAGS."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc: the library cannot be built here, and torch samples")
    path = tmp_path_factory.mktemp("sampler") / "sampler.so"
    extra = os.environ.get("TANDEM_KERNEL_TEST_FLAGS", "").split()
    command = [compiler, *sampler_flags(), "-Werror", *extra, "-shared", "-fPIC", str(SAMPLER_SOURCES / "sampler.c")]
    subprocess.run([*command, "-o", str(path), "-lm"], check=True, timeout=120)
    return path


def row(prompt: Sequence[int] = (), outputs: Sequence[int] = (), **sampling: object) -> SamplingRow:
    return SamplingRow(SamplingParams(**{"max_tokens": 1000, **sampling}), prompt, outputs)  # type: ignore[arg-type]


def random_logits(num_rows: int, vocab_size: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def bfloat16_ties(logits: Tensor) -> Tensor:
    return (logits * 3).bfloat16().float()


def coarse_ties(logits: Tensor) -> Tensor:
    return (logits * 2).round() / 2


def half_forbidden(logits: Tensor) -> Tensor:
    return logits.where(logits > 0, -math.inf)


def broken(logits: Tensor) -> Tensor:
    """One row NaN, one infinite, one without a finite logit, where there are as many."""
    logits = logits.clone()
    for i, values in enumerate([math.nan, -math.nan, math.inf]):
        logits[i : i + 1, 1] = values
    logits[3:4] = -math.inf
    return logits


SHAPES = {
    "peaked": lambda logits: logits * 10,
    "usual": lambda logits: logits * 3,
    "flat": lambda logits: logits,
    "equal": torch.zeros_like,
    "enormous": lambda logits: logits * 1e9,
    "minute": lambda logits: logits * 1e-30,
    "bfloat16": bfloat16_ties,
    "coarse": coarse_ties,
    "half forbidden": half_forbidden,
    "broken": broken,
}

FILTERS = {
    "temperature": st.sampled_from([0.0, 1e-5, 0.3, 0.7, 1.0, 1.0, 1.5, 3.0, 1e10, 3e38]),
    "top_p": st.sampled_from([1.0, 1.0, 0.05, 0.5, 0.8, 0.9, 0.95, 0.999, 0.9999999, 1e-44]),
    "top_k": st.sampled_from([0, 0, 0, -1, 1, 2, 5, 40, 300, 1010, 2**31 - 1]),
    "min_p": st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.2, 1e-7, 1e-44, 1.0]),
    "logprobs": st.sampled_from([None, None, 0, 3]),
    "seed": st.integers(0, 2**64 - 1),
}
EDITS = {
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7, 1e-37, 1e37]),
    "frequency_penalty": st.sampled_from([0.0, 0.7, -2.0]),
    "presence_penalty": st.sampled_from([0.0, -0.4, 1.1]),
    "logit_bias": st.sampled_from([{}, {1: 2.5, 0: -3.0, 99_999: 1.0}, {2: 100.0, 3: -100.0}]),
    "allowed_token_ids": st.sampled_from([(), (0, 1, 5, 7, 8, 9, 5, 99_999), tuple(range(1, 200, 3)), (2,)]),
    "min_tokens": st.sampled_from([0, 5]),
    "stop_token_ids": st.sampled_from([(), (1,), (4, 99_999)]),
    "ignore_eos": st.booleans(),
}
ROWS = st.builds(
    lambda options, prompt, outputs: row(prompt, outputs, **options),
    st.fixed_dictionaries(FILTERS, optional=EDITS) | st.fixed_dictionaries(FILTERS),
    st.lists(st.integers(0, 60), max_size=30),  # beyond some of the vocabularies
    st.lists(st.integers(0, 6), max_size=12),
)


@settings(max_examples=150, deadline=None)
@given(
    vocab_size=st.sampled_from([7, 40, 64, 65, 255, 256, 257, 300, 1000, 2000]),
    shape=st.sampled_from(sorted(SHAPES)),
    logits_seed=st.integers(0, 2**20),
    rows=st.lists(ROWS, min_size=1, max_size=6),
    num_candidates=st.sampled_from([3, 8, 256]),
    num_threads=st.sampled_from([1, 3]),
)
def test_any_mix_of_parameters_gives_the_definitions_tokens_and_logprobs(
    library_path: Path,
    vocab_size: int,
    shape: str,
    logits_seed: int,
    rows: list[SamplingRow],
    num_candidates: int,
    num_threads: int,
) -> None:
    logits = SHAPES[shape](random_logits(len(rows), vocab_size, logits_seed))
    before = logits.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "NUM_CANDIDATES", num_candidates)
        patch.setattr("services.engine.native.sampling.library._LOGITS_PER_THREAD", 64)
        expected = sample(logits, rows, EOS)
        found = Sampler(EOS, num_threads, library_path).sample(logits, rows)
    assert repr(found) == repr(expected)  # a logprob may be NaN
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())


def test_a_sampler_is_the_same_after_a_thousand_other_rows(library_path: Path) -> None:
    lasting = Sampler(EOS, 1, library_path)
    for step in range(40):
        vocab_size = (300, 1000)[step % 2]
        options = [{"repetition_penalty": 1.3}, {"frequency_penalty": 0.5, "top_p": 0.9}, {"top_k": 7}, {}]
        rows = [row([1, 2, 3], [4, 4, step], seed=step * 4 + i, **each) for i, each in enumerate(options)]
        logits = random_logits(len(rows), vocab_size, step, scale=2.0)
        assert lasting.sample(logits, rows) == sample(logits, rows, EOS)


def test_penalties_follow_an_output_that_grows(library_path: Path) -> None:
    prompt, outputs = list(range(5)), [9]
    kept = row(prompt, outputs, temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.3)
    lasting = Sampler(EOS, 1, library_path)
    for step in range(600):
        logits = random_logits(1, 50, step)
        (token,) = lasting.sample(logits, [kept])
        assert [token] == sample(logits, [row(prompt, list(outputs), **_asked(kept))], EOS)
        outputs.append(step % 50)


def _asked(kept: SamplingRow) -> dict[str, object]:
    names = ("temperature", "repetition_penalty", "frequency_penalty")
    return {name: getattr(kept.sampling, name) for name in names}


# ---- where a token hangs on the last bit -------------------------------------------------


class Outcomes(Sampler):
    """Keeps what the library said before the definition was asked."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(EOS, 1, path)
        self.said: list[int] = []
        choose = SamplerLibrary.sample

        def listen(*args: object) -> list[int]:
            found = choose(*args)  # type: ignore[arg-type]
            self.said += found
            return found

        patch.setattr(SamplerLibrary, "sample", listen)


@pytest.mark.parametrize("away", [-1e-7, -1e-9, 0.0, 1e-9, 1e-7])
def test_a_nucleus_that_ends_within_rounding_is_the_definitions(
    library_path: Path, monkeypatch: pytest.MonkeyPatch, away: float
) -> None:
    logits = random_logits(1, 2000, 5, scale=4.0)
    falling = logits[0].double().softmax(0).sort(descending=True).values.cumsum(0)
    rows = [row(top_p=float(falling[num_kept]) + away, seed=seed) for num_kept in range(3, 60) for seed in range(3)]
    outcomes = Outcomes(library_path, monkeypatch)
    many = logits.expand(len(rows), -1)
    assert outcomes.sample(many, rows) == sample(many, rows, EOS)
    assert outcomes.said.count(NotChosen.NEEDS_MASS) == len(rows)


@pytest.mark.parametrize("options", [{"top_k": 1000}, {"min_p": 1e-4}, {}])
def test_a_wide_nucleus_that_ends_within_rounding_is_the_definitions(
    library_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    logits = random_logits(1, 2000, 6)
    hot = {"temperature": 3e38, "top_p": 0.5, **options}  # the shares are equal: the border is anywhere near the middle
    rows = [row(seed=seed, **hot) for seed in range(40)]
    outcomes = Outcomes(library_path, monkeypatch)
    many = logits.expand(len(rows), -1)
    assert outcomes.sample(many, rows) == sample(many, rows, EOS)
    assert NotChosen.UNDECIDED in outcomes.said


def test_usual_rows_are_decided_in_c(library_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, object]] = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
        {"top_k": 500},
        {"min_p": 0.05},
        {"temperature": 1.5, "top_p": 0.95},
        {"top_p": 0.5, "repetition_penalty": 1.1},
        {"logit_bias": {7: 1.0}, "frequency_penalty": 0.1},
    ]
    rows = [row([1, 2, 3], [4, 4], seed=i, **options[i % len(options)]) for i in range(200)]
    logits = random_logits(len(rows), 5000, 1, scale=2.0)
    outcomes = Outcomes(library_path, monkeypatch)
    assert outcomes.sample(logits, rows) == sample(logits, rows, EOS)
    assert sum(token >= 0 for token in outcomes.said) >= 190


def test_a_mass_that_is_known_replaces_none(library_path: Path) -> None:
    asked = row(top_p=0.5)
    packed = with_mass(b"\0" * 32 + asked.packed_params, 1.5)
    assert len(packed) == 32 + len(asked.packed_params)
    assert np.frombuffer(packed[24:28], dtype=np.float32)[0] == 1.5


def test_a_library_from_other_sources_is_not_used(library_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.engine.native.sampling.library.source_digest", lambda sources: 1)
    with pytest.raises(ValueError, match="other sources"):
        SamplerLibrary(library_path)
