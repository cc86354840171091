"""Model families that the native engine lacks, over vLLM: equal tokens with and without a handoff; `make families`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.hf_models import reference_greedy
from tests.stack import preload
from tests.vllm.families import (
    FAMILIES,
    NUM_OUTPUTS,
    TOLERANCE,
    Family,
    check_family,
    gap,
    prompts_of,
    through_workers,
    write_family,
)

pytestmark = pytest.mark.vllm
if importlib.util.find_spec("vllm") is None:  # `make test` is free of it
    pytest.skip("vLLM is not installed", allow_module_level=True)


def family(title: str) -> Family:
    return next(each for each in FAMILIES if each.title == title)


def test_blocks_behind_a_window_are_kept_and_handed_over(tmp_path: Path) -> None:
    """Prompts of five windows, the second with the first as its prefix, which both sides have."""
    for verdict in check_family(family("Gemma 3 (text)"), tmp_path, lengths=(1, 65, 320, 350), chunk_sizes=(64,)):
        assert (verdict.num_as_colocated, verdict.num_as_transformers) == (4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("title", [each.title for each in FAMILIES])
def test_a_family_says_the_same_with_a_handoff_as_without_and_as_transformers(title: str, tmp_path: Path) -> None:
    for verdict in check_family(family(title), tmp_path):
        assert verdict.is_right, verdict
        assert family(title).packed or verdict.num_as_transformers == verdict.num_prompts


@pytest.mark.slow
@pytest.mark.parametrize("title", [each.title for each in FAMILIES])
def test_a_family_says_through_router_and_workers_what_transformers_says(title: str, tmp_path: Path) -> None:
    preload("vllm")
    oracle, _ = write_family(family(title), tmp_path / "oracle")
    expected = reference_greedy(oracle, prompts_of(), NUM_OUTPUTS, ignore_eos=True)
    for chunk_size in family(title).chunk_sizes:
        outputs = through_workers(family(title), tmp_path / str(chunk_size), chunk_size)
        if family(title).packed:
            assert max(gap(oracle, *each) for each in zip(prompts_of(), outputs, strict=True)) < TOLERANCE
        else:
            assert outputs == expected
