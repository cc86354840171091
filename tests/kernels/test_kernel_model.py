"""Whole models on the C kernels: the logits of `transformers`, and the same bits however a sequence is computed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.cpu_kernels import REQUIRED_FLAGS
from services.engine.model_config import UnsupportedModel
from services.engine.native.kernels.choice import KernelChoice
from services.engine.native.model import linear, model
from services.engine.native.model.model import LoadedModel, load_model
from tests.engine_model.paged_run import PagedRun, Sequenced
from tests.hf_models import FAMILIES, random_prompts, reference_logits, write_model
from tests.kernels.conftest import RUNNABLE, Libraries

# Largest and mean difference from `transformers` in float32 over the same weights; logits have a deviation of 5.
TOLERANCES = {"none": (1.2, 0.09), "int8": (3.0, 0.25), "int8 KV": (1.6, 0.12)}
# What runs on the processor's own instructions is tried at length; what emulates them, in plain C, on one model.
BIT_CASES = [
    (kernels, family)
    for kernels in RUNNABLE
    for family in (["qwen3", "mistral", "llama_bias"] if kernels in REQUIRED_FLAGS else ["mistral"])
]

Models = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @cache
    def get(family: str, **overrides: object) -> Path:
        directory = tmp_path_factory.mktemp(family) / "model"
        return write_model(directory, family, dtype="bfloat16", **overrides)

    return get


@pytest.fixture(scope="session")
def models(libraries: Libraries, model_dirs: Callable[..., Path]) -> Iterator[Models]:
    """Loads a model onto the named kernels, each once. `num_threads` is the kernels', not torch's."""
    patch = pytest.MonkeyPatch()
    num_threads = torch.get_num_threads()

    @cache
    def get(
        kernels: str, family: str, quantization: str = "none", num_threads: int = 1, **overrides: object
    ) -> LoadedModel:
        library = libraries(kernels)
        with patch.context() as here:
            here.setattr(model, "choose_kernels", lambda wanted: KernelChoice(library, "as the test says"))
            path = str(model_dirs(family, **overrides))
            quantized = {"kv_cache_dtype": "int8"} if quantization == "int8 KV" else {"quantization": quantization}
            loaded = load_model(path, num_threads=num_threads, **quantized)  # type: ignore[arg-type]
        torch.set_num_threads(1)
        assert loaded.compute_path.kernels == library.name
        return loaded

    yield get
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("quantization", TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", RUNNABLE)
def test_logits_are_those_of_transformers(
    models: Models, model_dirs: Callable[..., Path], kernels: str, family: str, quantization: str
) -> None:
    (token_ids,) = random_prompts([170])
    exact = reference_logits(model_dirs(family), token_ids)
    difference = (PagedRun(models(kernels, family, quantization)).whole(token_ids, chunk=64) - exact).abs()
    largest, mean = TOLERANCES[quantization]
    assert difference.max() < largest
    assert difference.mean() < mean


def test_equal_numerics_ids_mean_equal_logits_and_each_kernel_set_has_its_own(
    models: Models, model_dirs: Callable[..., Path]
) -> None:
    """Kernel sets may agree to the bit (AMX sums as the portable one does), so only int8 has to have other logits."""
    (token_ids,) = random_prompts([70])
    sets = [("portable", "int8"), ("portable", "none"), ("portable", "int8 KV")]
    sets += [(kernels, "none") for kernels in RUNNABLE if kernels in REQUIRED_FLAGS]
    logits: dict[str, Tensor] = {}
    for kernels, quantization in sets:
        one, two = (models(kernels, "mistral", quantization, num_threads=number) for number in (1, 2))
        assert one.compute_path.numerics == two.compute_path.numerics
        assert one.compute_path.is_exact
        logits[one.compute_path.numerics] = PagedRun(one).whole(token_ids)
        assert torch.equal(PagedRun(two).whole(token_ids), logits[one.compute_path.numerics]), (kernels, quantization)
    by_torch = load_model(str(model_dirs("mistral")), cpu_kernels="torch")
    assert not by_torch.compute_path.is_exact, "no case of BIT_CASES is of torch"
    int8, none, int8_kv, *_ = logits.values()
    assert len(logits) == len(sets)
    assert not torch.equal(int8, none)
    assert not torch.equal(int8_kv, none)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh"])
def test_other_activations_are_those_of_transformers(
    models: Models, model_dirs: Callable[..., Path], hidden_act: str
) -> None:
    (token_ids,) = random_prompts([80])
    exact = reference_logits(model_dirs("llama2", hidden_act=hidden_act), token_ids)
    difference = (PagedRun(models("portable", "llama2", hidden_act=hidden_act)).whole(token_ids) - exact).abs()
    assert difference.max() < TOLERANCES["none"][0]


@pytest.mark.parametrize("quantization", TOLERANCES)
@pytest.mark.parametrize(("kernels", "family"), BIT_CASES)
def test_no_bit_of_logits_or_cache_depends_on_how_a_sequence_is_computed(
    models: Models, kernels: str, family: str, quantization: str
) -> None:
    (token_ids,) = random_prompts([210], seed=3)
    expected, expected_cache = compute(models(kernels, family, quantization), token_ids, [210], 0)

    @settings(max_examples=15 if kernels in REQUIRED_FLAGS else 4, deadline=None)
    @given(
        cuts=st.sets(st.integers(1, 209), max_size=12),
        placement=st.integers(0, 10_000),
        num_threads=st.integers(1, 3),
        num_others=st.integers(0, 4),
    )
    def check(cuts: set[int], placement: int, num_threads: int, num_others: int) -> None:
        stops = [*sorted(cuts), 210]
        pieces = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
        other = models(kernels, family, quantization, num_threads)
        logits, cache = compute(other, token_ids, pieces, placement, num_others)
        assert torch.equal(logits, expected)
        assert torch.equal(cache, expected_cache)

    check()


def compute(
    model: LoadedModel, token_ids: list[int], pieces: list[int], placement: int, num_others: int = 0
) -> tuple[Tensor, Tensor]:
    """Compute the tokens in pieces, each in a batch with chunks of other sequences, before and after it.

    Returns the logits `[T, vocab_size]`, and the bytes of the keys and values. Fresh blocks hold NaN.
    """
    chance = random.Random(placement)
    run = PagedRun(model, num_blocks=220, block_size=chance.choice([16, 32]), seed=placement)
    run.kv_cache.view(torch.uint8).fill_(0xFF)  # NaN, and in 8 bits a scale that is one
    others = [Sequenced() for _ in range(num_others)]
    subject = Sequenced()
    logits = []
    start = 0
    for size in pieces:
        work: list[tuple[Sequenced, list[int]]] = [(subject, token_ids[start : start + size])]
        for number, other in enumerate(others):
            (new,) = random_prompts([chance.choice([1, 1, 5, 40])], seed=placement + start + number)
            work.insert(chance.randrange(len(work) + 1), (other, new))
        results = run.step(work)
        logits.append(results[[sequence for sequence, _ in work].index(subject)])
        start += size
    blocks = run.kv_cache[subject.block_table].permute(1, 2, 3, 0, 4, 5)  # layers, 2, KV heads, blocks, tokens, dims
    keys_values = blocks.flatten(3, 4)[:, :, :, : len(token_ids)]
    return torch.cat(logits), keys_values.contiguous().view(torch.uint8)


def test_int8_of_weights_and_of_kv_have_fingerprints_of_their_own_and_the_kernels_have_not(models: Models) -> None:
    portable, emulated = models("portable", "qwen2"), models("amx-emulated", "qwen2")
    assert portable.fingerprint == emulated.fingerprint
    quantized = [models("portable", "qwen2", each).fingerprint for each in ("int8", "int8 KV")]
    assert len({portable.fingerprint, *quantized}) == 3


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("token_ids", [1, 100_000, 2], "token id is not below"),
        ("token_ids", [1, -1, 2], "token id is not below"),
        ("slot_mapping", [0, 1, 160 * 16], "slot is not below 2560"),
        ("block_tables", [[160]], "block id is not below 160"),
        ("logits_indices", [3], "row of logits is not below 3"),
        ("logits_indices", [1, 1], "must ascend"),
    ],
)
def test_what_lies_beyond_an_array_is_refused(models: Models, field: str, values: list[int], message: str) -> None:
    run = PagedRun(models("portable", "qwen2"))
    batch = run.batch([(Sequenced(), [1, 2, 3])])
    wrong = torch.tensor(values, dtype=getattr(batch, field).dtype)
    with pytest.raises(IndexError, match=message):
        run.model.forward(replace(batch, **{field: wrong}), run.kv_cache)


def test_blocks_that_the_kernels_cannot_read_are_refused(models: Models) -> None:
    with pytest.raises(UnsupportedModel, match="block_size 24 is no multiple of 16"):
        models("portable", "qwen2").new_kv_cache(2, 24)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"dtype": "float32"}, "torch: in float32, and the CPU kernels are for bfloat16"),
        ({"cpu_kernels": "torch"}, "torch, as cpu_kernels says"),
    ],
)
def test_int8_without_the_kernels_is_refused(
    model_dirs: Callable[..., Path], asked: dict[str, str], reason: str
) -> None:
    path = str(model_dirs("qwen2"))
    assert load_model(path, **asked).compute_path.reason.startswith(reason)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match=f"quantization 'int8' needs the CPU kernels.*{reason}"):
        load_model(path, quantization="int8", **asked)  # type: ignore[arg-type]


def test_a_machine_without_kernels_computes_with_torch(
    model_dirs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(linear, "_has_onednn", lambda: False)  # it packs no bfloat16 on a processor without AVX-512
    monkeypatch.setattr(model, "choose_kernels", lambda wanted: KernelChoice(None, "torch, since nothing is built"))
    path = str(model_dirs("qwen2"))
    loaded = load_model(path)
    assert (loaded.compute_path.kernels, loaded.compute_path.reason) == ("torch", "torch, since nothing is built")
    with pytest.raises(
        UnsupportedModel, match=r"cpu_kernels 'avx2' cannot compute it: .* torch, since nothing is built"
    ):
        load_model(path, cpu_kernels="avx2")


def test_kernels_compute_bfloat16_where_torch_would_widen_it(
    libraries: Libraries, model_dirs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on AVX2: what the processor can do in hardware is not asked."""
    library = libraries("portable")
    monkeypatch.setattr(linear, "cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(model, "choose_kernels", lambda wanted: KernelChoice(library, f"{wanted}, as the test says"))
    for wanted in ("auto", "avx2"):
        loaded = load_model(str(model_dirs("qwen2")), cpu_kernels=wanted)
        assert (loaded.compute_path.kernels, loaded.dtype) == ("portable", "bfloat16")
        assert loaded.compute_path.reason == f"{wanted}, as the test says"
