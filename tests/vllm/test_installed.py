"""The vLLM that `make install-vllm` brings: one that we run with, for this machine, its flags those of the table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from services.engine.check import Machine
from services.engine.choice import check_vllm, vllm_version
from services.settings import engine_arguments
from services.settings.engine_args import ENGINE_FLAGS

pytestmark = pytest.mark.vllm
# Read by vLLM's parser before argparse sees it.
_SHORT_FOR_LEVELS = "-O"


@pytest.fixture(scope="module")
def parser() -> Iterator[argparse.ArgumentParser]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        yield EngineArgs.add_cli_args(FlexibleArgumentParser())


def test_it_is_one_that_we_run_with_on_this_machine() -> None:
    check_vllm(vllm_version(), Machine.this().device("auto"), "the test wants it")


def test_it_is_for_the_device_that_its_version_names() -> None:
    from vllm.platforms import current_platform

    assert current_platform.device_type == ("cpu" if str(vllm_version()).endswith("+cpu") else "cuda")


def test_every_flag_that_it_has_is_in_the_table_and_takes_as_many_values(parser: argparse.ArgumentParser) -> None:
    theirs = {
        flag: "switch" if action.nargs == 0 else "list" if action.nargs in ("+", "*") else "value"
        for action in parser._actions
        for flag in action.option_strings
        if not flag.startswith("--no-") and flag not in ("-h", "--help")
    }
    ours = {name: row for row in ENGINE_FLAGS for name in row.names}
    assert theirs.keys() <= ours.keys(), f"decide what becomes of {sorted(theirs.keys() - ours.keys())}"
    for flag, kind in theirs.items():
        row = ours[flag]
        assert (row.kind == "switch") == (kind == "switch"), flag
        assert row.kind == kind or not row.goes_through, flag


def test_it_takes_what_goes_through(parser: argparse.ArgumentParser) -> None:
    text = "-tp 2 --enable_lora --max-loras=4 -O3 --no-enable-eplb --cudagraph-capture-sizes 1 2 4"
    taken = parser.parse_args(engine_arguments(f"""{text} --speculative-config '{{"method": "ngram"}}'"""))
    assert (taken.tensor_parallel_size, taken.enable_lora, taken.max_loras) == (2, True, 4)
    assert (str(taken.optimization_level), taken.enable_eplb) == ("3", False)
    assert taken.cudagraph_capture_sizes == [1, 2, 4]
    assert taken.speculative_config == {"method": "ngram"}


def test_it_has_all_flags_that_go_through(parser: argparse.ArgumentParser) -> None:
    """Those that only another version of our range has are named here: a user of this one hears of it from vLLM."""
    theirs = {flag for action in parser._actions for flag in action.option_strings} | {_SHORT_FOR_LEVELS}
    of_one_only = {"--enable-hc-sp", "--enable-shm-tensor-arena"}  # 0.32
    ours = {name for row in ENGINE_FLAGS if row.goes_through for name in row.names}
    assert ours - theirs <= of_one_only
