"""Settings that make no sense are refused by name; flags are the settings."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from loadtest.plan import (
    LoadOptions,
    OptionError,
    add_flags,
    options_from,
)


def parse(*flags: str) -> LoadOptions:
    parser = argparse.ArgumentParser()
    add_flags(parser.add_argument)
    return options_from(parser.parse_args(flags))


def test_without_flags_there_are_the_defaults() -> None:
    assert parse() == LoadOptions()


def test_every_setting_is_a_flag() -> None:
    options = parse("--rate", "2.5", "--num-requests", "7", "--ignore-eos", "false", "--trace", "x.csv", "--seed", "3")
    assert options == replace(LoadOptions(), rate=2.5, num_requests=7, ignore_eos=False, trace="x.csv", seed=3)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--rate", "0"), "--rate must be positive"),
        (("--rate", "nan"), "--rate must be positive"),
        (("--warmup-requests", "-1"), "--warmup-requests must not be negative"),
        (("--turns", "0.5"), "--turns must be at least 1"),
        (("--goodput", "ttft"), "--goodput: 'ttft' is not NAME:MILLISECONDS"),
        (("--goodput", "speed:3"), "--goodput: 'speed' is no objective"),
        (("--goodput", " "), "--goodput: no objective"),
        (("--token-ids", "9"), "--token-ids must be FIRST:END"),
        (("--token-ids", "9:9"), "--token-ids must be FIRST:END"),
        (("--extra-body", "[]"), "--extra-body must be a JSON object"),
        (("--extra-body", "{"), "--extra-body is no JSON"),
        (("--arrivals", "trace"), "--arrivals trace needs --trace"),
        (("--endpoint", "chat", "--prompts", "tokens"), "takes text alone"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(flags: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        parse(*flags)


def test_a_choice_from_a_web_form_is_checked_too() -> None:
    with pytest.raises(OptionError, match="--workload must be one of"):
        LoadOptions(workload="poetry")
